#!/usr/bin/env python3
"""Writes a root directory as an OCI archive of one layer, for `ctr images import`.

usage: oci.py ROOT ARCHIVE REFERENCE CONFIG

CONFIG is the JSON of the image config's "config" member (Entrypoint, Cmd, Env, ...).
The same tree always makes the same archive: names are sorted and times are fixed.
Prints the digest of the manifest.
"""

import hashlib
import io
import json
import os
import platform
import sys
import tarfile

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
CREATED = "2026-01-01T00:00:00Z"
MTIME = 1767225600


def entries(root):
    """All paths below root, parents first, in an order that does not change."""
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(names + files):
            yield os.path.relpath(os.path.join(directory, name), root)


def write_layer(root, path):
    """The tree as an uncompressed tar: quick to write and to unpack. Hard links stay."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in entries(root):
            full = os.path.join(root, name)
            info = tar.gettarinfo(full, arcname=name)
            info.mtime = MTIME
            info.uname = info.gname = ""
            if info.isreg():
                with open(full, "rb") as content:
                    tar.addfile(info, content)
            else:
                tar.addfile(info)


def digest_of_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while piece := content.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Archive:
    """An OCI image layout inside a tar."""

    def __init__(self, path):
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)

    def add(self, name, data):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), MTIME, 0o644
        self.tar.addfile(info, io.BytesIO(data))

    def add_blob(self, value, media_type):
        data = json.dumps(value, sort_keys=True).encode()
        digest = hashlib.sha256(data).hexdigest()
        self.add(f"blobs/sha256/{digest}", data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def add_layer(self, path):
        digest = digest_of_file(path)
        info = tarfile.TarInfo(f"blobs/sha256/{digest}")
        info.size, info.mtime, info.mode = os.path.getsize(path), MTIME, 0o644
        with open(path, "rb") as content:
            self.tar.addfile(info, content)
        return {
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": f"sha256:{digest}",
            "size": info.size,
        }


def main():
    root, path, reference, settings = sys.argv[1:]
    layer_path = path + ".layer"
    write_layer(root, layer_path)
    archive = Archive(path)
    layer = archive.add_layer(layer_path)
    os.unlink(layer_path)
    machine = platform.machine()
    config = archive.add_blob(
        {
            "created": CREATED,
            "architecture": ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": json.loads(settings),
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "history": [{"created": CREATED, "created_by": "hack/images"}],
        },
        "application/vnd.oci.image.config.v1+json",
    )
    manifest = archive.add_blob(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
        },
        "application/vnd.oci.image.manifest.v1+json",
    )
    manifest["annotations"] = {
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": reference.rpartition(":")[2],
    }
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    }
    archive.add("index.json", json.dumps(index, sort_keys=True).encode())
    archive.add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    archive.tar.close()
    print(manifest["digest"])


if __name__ == "__main__":
    main()
