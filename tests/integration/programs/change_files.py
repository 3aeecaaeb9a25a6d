"""Does to a file system what a program can do to it."""

import os
import shutil
import socket
import stat


def write(path, content="x"):
    with open(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


os.makedirs("/data/deep/er/and/deeper", mode=0o750)
write("/data/plain", "plain\n")
write("/data/empty", "")
write("/data/large", os.urandom(9 << 20))
write("/data/name with spaces and \u00fcml\u00e4uts\n")
write(b"/data/not \xff utf-8")

os.symlink("plain", "/data/symlink")
os.symlink("/no/where", "/data/dangling")
os.link("/data/plain", "/data/hard link")
os.link("/data/plain", "/data/deep/another")

write("/data/setuid")
os.chown("/data/setuid", 1234, 4321)
os.chmod("/data/setuid", 0o6755)
os.mkdir("/data/sticky")
os.chown("/data/sticky", 99, 98)
os.chmod("/data/sticky", 0o1777)

with open("/data/sparse", "wb") as file:
    file.write(b"head")
    file.seek(300 << 20)
    file.write(b"tail")
with open("/data/hole at the end", "wb") as file:
    file.write(b"head")
    file.truncate(50 << 20)

os.mknod("/data/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
os.mkfifo("/data/fifo", 0o620)
listener = socket.socket(socket.AF_UNIX)
listener.bind("/data/socket")
listener.close()

os.utime("/data/plain", ns=(123456789, 1111111111987654321))
os.utime("/data/symlink", ns=(1, 2222222222123456789), follow_symlinks=False)
os.setxattr("/data/large", "user.colour", b"white\x00black")
os.setxattr("/data/deep", "user.of", b"a directory")

# What the image has: a whiteout, an opaque directory, a copy with another mode,
# and a renamed file, which is a copy and a whiteout.
os.unlink("/etc/passwd")
shutil.rmtree("/var/log")
os.mkdir("/var/log")
write("/var/log/new")
os.chmod("/srv/server.py", 0o600)
os.rename("/etc/group", "/etc/groups")
