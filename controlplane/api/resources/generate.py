"""The CustomResourceDefinitions, made out of the types: `python -m controlplane.api.resources.generate`.

Writes one file per kind into the chart's `crds` folder and the list of all fields into docs/resources.md, or
compares with what is there (`--check`), which `./dev check` does. `definitions()` is also what the operator's
image applies on an upgrade.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from controlplane.api.resources import KINDS
from controlplane.api.resources.base import Json, Resource
from controlplane.api.resources.names import GROUP, PART_OF, VERSION
from controlplane.api.resources.reference import reference
from controlplane.api.resources.schema import structural

FOLDER = Path("charts/deepflow/crds")
DOCUMENT = Path("docs/resources.md")
HEADER = "# Generated from controlplane/api/resources by `python -m controlplane.api.resources.generate`.\n"
CATEGORY = "deepflow"
_OF_ALL: Json = {
    "apiVersion": {"type": "string", "description": "Version of this schema."},
    "kind": {"type": "string", "description": "Kind of this object."},
    "metadata": {"type": "object"},
}


def definition(kind: type[Resource]) -> Json:
    """The CustomResourceDefinition of one kind."""
    name = kind.__name__
    schema = structural(kind, leave_out=frozenset(_OF_ALL))
    properties = schema["properties"] = {**_OF_ALL, **schema["properties"]}
    properties["status"].pop("default", None)  # status is the operator's to begin
    schema["required"] = ["spec"]
    schema["description"] = kind.about
    if kind.name_max < 63:
        schema.setdefault("x-kubernetes-validations", []).append(
            {
                "rule": f"size(self.metadata.name) <= {kind.name_max}",
                "message": f"the name must have at most {kind.name_max} characters",
            }
        )
    subresources: Json = {"status": {}}
    if kind.scale is not None:
        spec, status, selector = kind.scale
        subresources["scale"] = {
            "specReplicasPath": spec,
            "statusReplicasPath": status,
            "labelSelectorPath": selector,
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{kind.plural}.{GROUP}",
            "labels": {"app.kubernetes.io/name": PART_OF, "app.kubernetes.io/part-of": PART_OF},
            # Removing a definition removes every object of its kind: never with a release.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": name,
                "listKind": f"{name}List",
                "plural": kind.plural,
                "singular": name.lower(),
                "shortNames": list(kind.short_names),
                "categories": [CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": subresources,
                    "additionalPrinterColumns": [
                        {
                            "name": column.name,
                            "type": column.type,
                            "jsonPath": column.path,
                            "description": column.description,
                            **({"priority": column.priority} if column.priority else {}),
                        }
                        for column in kind.columns
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def definitions() -> list[Json]:
    """All definitions, in the order of KINDS."""
    return [definition(kind) for kind in KINDS]


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: anchors are hard to read, and some tools do not know them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def files() -> dict[str, str]:
    """File name to text, as they lie in the chart."""
    return {
        f"{made['metadata']['name']}.yaml": HEADER
        + yaml.dump(made, Dumper=_Plain, sort_keys=False, width=110, allow_unicode=True)
        for made in definitions()
    }


def differences(folder: Path, document: Path) -> list[str]:
    """What in `folder`, and of `document`, is not as it would be written; empty where all is."""
    wanted = files()
    problems = [
        f"{folder / name} {'differs' if (folder / name).exists() else 'is missing'}"
        for name, text in wanted.items()
        if not (folder / name).exists() or (folder / name).read_text() != text
    ]
    if not document.exists() or document.read_text() != reference(definitions()):
        problems.append(f"{document} differs")
    return problems + [
        f"{path} is not generated" for path in folder.glob("*.yaml") if path.name not in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the definitions")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="list of all fields")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    if args.check:
        problems = differences(args.out, args.document)
        for problem in problems:
            print(f"{problem}: run `python -m controlplane.api.resources.generate`", file=sys.stderr)
        sys.exit(1 if problems else 0)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (args.out / name).write_text(text)
    args.document.write_text(reference(definitions()))


if __name__ == "__main__":
    main()
