"""The operator against a Kubernetes API: claims, roles, drains, replacements, deletion, what is said of it."""

from __future__ import annotations

from tests.support.kube_world import World


async def test_a_pool_fills_and_a_model_is_served_from_it(world: World) -> None:
    async with world.operator():
        await world.pool(size=2)
        await world.until_warm(2)
        await world.serving()
        (pod,) = await world.until_serving(1)
        await world.until_ready("Serving")
        await world.until_warm(2)  # the pool refills behind
    assert world.te(pod).revision.startswith("m@")
    status = (await world.get_serving())["status"]
    assert status["replicas"] == "C1/1" and status["revision"].startswith("m@")
