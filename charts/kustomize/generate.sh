#!/usr/bin/env bash
# Renders the chart for `kubectl apply -k`. $HELM: the helm to use. $1: where to, here by default.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here}
mkdir -p "$out/crds" "$out/deepflow"
note="# Rendered from charts/deepflow by charts/kustomize/generate.sh."
{
  echo "$note"
  "${HELM:-helm}" template deepflow "$here/../deepflow" --namespace deepflow --no-hooks -f "$here/values.yaml"
} >"$out/deepflow/deepflow.yaml"
{
  echo "$note"
  for definition in "$here"/../deepflow/crds/*.yaml; do
    echo "---"
    cat "$definition"
  done
} >"$out/crds/crds.yaml"
