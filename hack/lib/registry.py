#!/usr/bin/env python3
"""Serves OCI archives as a registry that can only be pulled from, on 127.0.0.1.

usage: registry.py PORT REPOSITORY:TAG=ARCHIVE[+ARCHIVE...]...

Several archives make one image: their layers on top of each other, with the
settings of the last. Speaks what a pull needs of the OCI distribution
specification: manifests by tag or digest, and blobs. Prints one line when it
serves.
"""

import hashlib
import json
import sys
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


class Blob:
    """A part of a file, or bytes."""

    def __init__(self, size, data=b"", path=None, offset=0):
        self.size, self.data, self.path, self.offset = size, data, path, offset

    def copy_to(self, out):
        if self.path is None:
            out.write(self.data)
            return
        with open(self.path, "rb") as archive:
            archive.seek(self.offset)
            left = self.size
            while left:
                piece = archive.read(min(left, 1 << 20))
                out.write(piece)
                left -= len(piece)


class Registry:
    def __init__(self):
        self.blobs = {}
        self.manifests = {}

    def read_archive(self, path):
        """Takes the blobs in; returns the manifest and the config of its image."""
        small = {}
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name == "index.json":
                    index = json.load(tar.extractfile(member))
                if not member.name.startswith("blobs/sha256/"):
                    continue
                digest = "sha256:" + member.name.rpartition("/")[2]
                self.blobs[digest] = Blob(member.size, path=path, offset=member.offset_data)
                if member.size < 1 << 16:
                    small[digest] = tar.extractfile(member).read()
        manifest = json.loads(small[index["manifests"][0]["digest"]])
        return manifest, json.loads(small[manifest["config"]["digest"]])

    def add_bytes(self, value):
        data = json.dumps(value, sort_keys=True).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = Blob(len(data), data=data)
        return digest

    def add_image(self, repository, tag, paths):
        layers, diff_ids = [], []
        for path in paths:
            manifest, config = self.read_archive(path)
            layers += manifest["layers"]
            diff_ids += config["rootfs"]["diff_ids"]
        config["rootfs"]["diff_ids"] = diff_ids
        config.pop("history", None)
        digest = self.add_bytes(config)
        manifest["layers"] = layers
        manifest["config"] = {"mediaType": CONFIG, "digest": digest, "size": self.blobs[digest].size}
        digest = self.add_bytes(manifest)
        self.manifests[repository, tag] = self.manifests[repository, digest] = digest


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, registry):
        repository, _, what = self.path.split("?")[0].removeprefix("/v2/").rpartition("/")
        repository, _, kind = repository.rpartition("/")
        if kind == "manifests" and (repository, what) in registry.manifests:
            return registry.manifests[repository, what], MANIFEST
        if kind == "blobs" and what in registry.blobs:
            return what, "application/octet-stream"
        return None, None

    def do_HEAD(self, body=False):
        registry = self.server.registry
        digest, media_type = self.answer(registry)
        blob = registry.blobs.get(digest)
        if blob is None:
            self.send_response(200 if self.path == "/v2/" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(blob.size))
        self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if body:
            blob.copy_to(self.wfile)

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


def main():
    registry = Registry()
    for argument in sys.argv[2:]:
        reference, _, paths = argument.partition("=")
        repository, _, tag = reference.rpartition(":")
        registry.add_image(repository, tag, paths.split("+"))
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.registry = registry
    print("serving", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
