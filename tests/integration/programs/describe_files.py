"""Prints everything there is to say about each file below a directory: one line each.

Directories' times and link counts are left out: mounts and programs that run change them.
"""

import hashlib
import os
import stat
import sys

root = sys.argv[1]
skipped = {"proc", "sys", "dev", "run"}
first_names = {}


def describe(path, shown):
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    yield shown
    yield oct(info.st_mode)
    yield f"{info.st_uid}:{info.st_gid}"
    if kind != stat.S_IFDIR:
        yield f"links {info.st_nlink} mtime {info.st_mtime_ns}"
    if kind == stat.S_IFREG:
        with open(path, "rb") as content:
            yield f"size {info.st_size} {hashlib.sha256(content.read()).hexdigest()[:16]}"
        if info.st_blocks * 512 < info.st_size // 2:
            yield "sparse"
        if info.st_nlink > 1:
            yield "same as " + first_names.setdefault((info.st_dev, info.st_ino), shown)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        yield f"device {os.major(info.st_rdev)},{os.minor(info.st_rdev)}"
    if kind == stat.S_IFLNK:
        yield "-> " + ascii(os.readlink(path))
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        yield name + "=" + os.getxattr(path, name, follow_symlinks=False).hex()


for directory, names, files in os.walk(root):
    names.sort()
    if directory == root:
        names[:] = [name for name in names if name not in skipped]
    for name in sorted(names + files):
        path = os.path.join(directory, name)
        print(*describe(path, ascii(os.path.relpath(path, root))))
