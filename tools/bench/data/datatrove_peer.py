"""datatrove's near-deduplication with its own defaults, for `megaphi bench data`.

Called as `python -m tools.bench.data.datatrove_peer DIR WORKERS`: JSONL files in DIR/in, results in
DIR/out.
"""

import sys
from pathlib import Path
from typing import Any


def main(place: Path, workers: int) -> None:
    """Run the four steps one after another."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    source, out = str(place / "in"), place / "out"
    signatures, buckets, remove = (str(out / name) for name in ("signatures", "buckets", "remove"))
    config = MinhashConfig()

    def run(name: str, tasks: int, *steps: Any) -> None:
        LocalPipelineExecutor(
            pipeline=list(steps),
            tasks=tasks,
            workers=workers,
            logging_dir=str(out / "logs" / name),
        ).run()

    run("signature", workers, JsonlReader(source), MinhashDedupSignature(signatures, config))
    run("bucket", config.num_buckets, MinhashDedupBuckets(signatures, buckets, config=config))
    run("cluster", 1, MinhashDedupCluster(buckets, remove, config))
    kept = JsonlWriter(str(out / "kept"), compression=None)
    run("filter", workers, JsonlReader(source), MinhashDedupFilter(remove), kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
