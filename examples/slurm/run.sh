#!/bin/bash
# examples/slurm/run.sh traces/ archives/: from a pilot to the finished catalogue.
set -euo pipefail
here="$(dirname "$0")"
h5traces="${H5TRACES:-h5traces}"

# 1. A pilot: what a batch takes as an archive, in each tier; then this batch, to see what it holds.
first="$(find "$1" -name '*.pkl*' | sort | head -n 1)"
"$h5traces" estimate --pilot "$first"
"$h5traces" convert "$first" -o "${2%/}.pilot.h5" --skip-existing
"$h5traces" inspect "${2%/}.pilot.h5"

# 2. All of it; returns when the array has ended.
sbatch --wait "$here/convert.sh" "$1" "$2" || true

# 3. Ranks that are missing or failed, once more.
missing="$("$h5traces" status "$2" --missing)" || true
if [ -n "$missing" ]; then sbatch --wait --array="$missing" "$here/convert.sh" "$1" "$2"; fi

# 4. One report, and one catalogue, which opens as one archive; not of a run that lacks something.
"$h5traces" collect "$2" -o "${2%/}/catalogue.parquet" --verify all
