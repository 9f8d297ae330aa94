"""Uploading to S3, on this machine: h5traces beside its client (s3fs) alone, and boto3.

    python benchmarks/upload.py [--mbytes N]

All send parts of 16 MiB, 8 at a time. The server takes most of the time of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
import numpy as np
import s3fs
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from h5traces.storage.remote.paths import RemoteOptions, RemotePath
from h5traces.storage.remote.uploading import upload

_SERVER = Path(__file__).parents[1] / "tests" / "remote" / "s3_server.py"
_ROUNDS = 5


def main(mbytes: int) -> None:
    """Print the speed of both, and the ratio."""
    command = [sys.executable, str(_SERVER)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
            path = Path(scratch) / "run.h5"
            path.write_bytes(np.random.default_rng(0).bytes(mbytes * 10**6))
            client = boto3.client("s3", config=Config(max_pool_connections=16))
            client.create_bucket(Bucket="bucket")
            files = s3fs.S3FileSystem(use_listings_cache=False)
            parts = TransferConfig(
                multipart_threshold=16 << 20, multipart_chunksize=16 << 20, max_concurrency=8
            )
            seconds: dict[str, list[float]] = {"boto3": [], "s3fs": [], "h5traces": []}
            for number in range(_ROUNDS):
                started = time.perf_counter()
                client.upload_file(str(path), "bucket", f"b{number}", Config=parts)
                first = time.perf_counter()
                files.put_file(
                    str(path), f"bucket/s{number}", chunksize=16 << 20, max_concurrency=8
                )
                middle = time.perf_counter()
                upload(path, RemotePath(f"s3://bucket/h{number}"), RemoteOptions())
                seconds["boto3"].append(first - started)
                seconds["s3fs"].append(middle - first)
                seconds["h5traces"].append(time.perf_counter() - middle)
                for name in "bsh":
                    client.delete_object(Bucket="bucket", Key=f"{name}{number}")
        finally:
            server.kill()
    speeds = {name: mbytes / statistics.median(each) for name, each in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name}: {speed:.0f} MB/s")
    for name in ("s3fs", "boto3"):
        print(f"h5traces / {name}: {speeds['h5traces'] / speeds[name]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbytes", type=int, default=200)
    main(parser.parse_args().mbytes)
