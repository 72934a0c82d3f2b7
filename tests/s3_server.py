"""A real S3 API server on loopback, moto's, with a bucket: DVC and MLflow speak HTTP to it, as to Amazon."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import EndpointConnectionError
from project import Project, clean_environment
from tracker import free_port, wait_for

BUCKET = "team"
REGION = "us-east-1"
# Moto takes any; a client without them is refused before it asks a server
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key-of-the-test", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}


class S3Server:
    """Its address, what clients need in their environment, and its objects by key."""

    def __init__(self, address: str, process: "subprocess.Popen[bytes]") -> None:
        self.address = address
        self.process = process
        self.environment = CREDENTIALS | {"AWS_DEFAULT_REGION": REGION, "AWS_ENDPOINT_URL_S3": address}
        self._client: Any = boto3.client(
            "s3", endpoint_url=address, region_name=REGION,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip

    def has_bucket(self) -> bool:
        """Whether it is up; it then has the bucket."""
        assert self.process.poll() is None
        try:
            self._client.create_bucket(Bucket=BUCKET)
        except EndpointConnectionError:
            return False
        return True

    def objects(self, prefix: str = "") -> dict[str, int]:
        """The bytes of each object below a prefix, by its key."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}


@contextmanager
def s3_server() -> Iterator[S3Server]:
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        server = S3Server(f"http://127.0.0.1:{port}", process)
        try:
            wait_for(server.has_bucket)
            yield server
        finally:
            process.kill()


def add_remote(project: Project, server: S3Server, prefix: str) -> None:
    """As docs/remotes.md says: the place is committed, credentials are the environment's alone."""
    project.dvc("remote", "add", "--default", "team", f"s3://{BUCKET}/{prefix}")
    project.dvc("remote", "modify", "team", "endpointurl", server.address)
    project.commit()


def clone(repository: Path, root: Path, env: Mapping[str, str]) -> Project:
    """A clone with an empty cache, whose DVC has nothing in common with that of another folder."""
    root.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "clone", "--quiet", repository, root], check=True, env=clean_environment(root.parent))
    return Project(root, env)
