"""Five-field cron expressions, as schedules of replicas use them: is a window open now? Pure.

Fields: minute, hour, day of the month, month, day of the week (0 and 7 are Sunday; names in English). Lists,
ranges and steps. As in every cron, restricting both kinds of days means either of them. Hours that a change
to summer time leaves out do not start a window; hours that come twice start one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_BOUNDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


class BadCron(ValueError):
    """`str()` says which field is wrong."""


@dataclass(frozen=True, slots=True)
class Cron:
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    any_weekday: bool
    zone: ZoneInfo

    def open_since(self, now: float, duration: float) -> float | None:
        """When the window that is open at `now` (seconds since the epoch) began; None if none is."""
        local = datetime.fromtimestamp(now, self.zone)
        first = datetime.fromtimestamp(now - duration, self.zone)
        day = local.date()
        while day >= first.date():
            if self._takes(day.month, day.day, day.isoweekday() % 7):
                for hour in sorted(self.hours, reverse=True):
                    for minute in sorted(self.minutes, reverse=True):
                        start = datetime(day.year, day.month, day.day, hour, minute, tzinfo=self.zone)
                        stamp = start.timestamp()
                        if datetime.fromtimestamp(stamp, UTC).astimezone(self.zone).hour != hour:
                            continue  # left out by summer time
                        if now - duration < stamp <= now:
                            return stamp
            day -= timedelta(days=1)
        return None

    def _takes(self, month: int, day: int, weekday: int) -> bool:
        if month not in self.months:
            return False
        by_day, by_weekday = day in self.days, weekday in self.weekdays
        if self.any_day or self.any_weekday:
            return by_day and by_weekday
        return by_day or by_weekday


def parse(text: str, zone: str = "UTC") -> Cron:
    """Raises BadCron."""
    fields = text.split()
    if len(fields) != 5:
        raise BadCron(f"{text!r} has {len(fields)} fields, not five")
    names = ((), (), (), _MONTHS, _DAYS)
    values = [
        _field(field.lower(), low, high, words)
        for field, (low, high), words in zip(fields, _BOUNDS, names, strict=True)
    ]
    try:
        where = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadCron(f"{zone!r} is no time zone") from None
    return Cron(
        minutes=values[0],
        hours=values[1],
        days=values[2],
        months=values[3],
        weekdays=frozenset(value % 7 for value in values[4]),
        any_day=fields[2].startswith("*"),
        any_weekday=fields[4].startswith("*"),
        zone=where,
    )


def _field(text: str, low: int, high: int, words: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        try:
            every = int(step) if step else 1
            if span == "*":
                start, end = low, high
            else:
                start = _value(first, words, low)
                end = _value(last, words, low) if last else (high if step else start)
        except ValueError:
            raise BadCron(f"{part!r} is no part of a cron field") from None
        if not low <= start <= end <= high or every < 1:
            raise BadCron(f"{part!r} must lie within {low} and {high}")
        found.update(range(start, end + 1, every))
    return frozenset(found)


def _value(text: str, words: tuple[str, ...], low: int) -> int:
    if text in words:
        return words.index(text) + (low if len(words) == 12 else 0)
    return int(text)
