"""What a Linux guest does with a disk and a network card; a shell script each, for :mod:`tests.interop.linux`."""

from __future__ import annotations

DISK_DRIVERS = ("crc32c_generic", "nvme", "ext4")
DISK_PROGRAMS = ("e2fsck.static",)
DISK = """\
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/nvme0n1 ] && break; sleep 1; done
[ -b /dev/nvme0n1 ] || fail no disk
grep nvme /proc/interrupts
mke2fs -F /dev/nvme0n1 > /dev/null || fail mke2fs
mkdir /mnt
mount -t ext4 /dev/nvme0n1 /mnt || fail mount
dd if=/dev/urandom of=/mnt/a bs=64k count=128 2> /dev/null || fail write
for i in 1 2 3 4 5 6 7 8; do mkdir /mnt/d$i; cp /mnt/a /mnt/d$i/f 2> /dev/null || break; done
(cd /mnt && find . -type f | sort | xargs sha256sum) > /sums
umount /mnt || fail umount
echo 3 > /proc/sys/vm/drop_caches
e2fsck.static -f -n /dev/nvme0n1 || fail e2fsck
mount -t ext4 /dev/nvme0n1 /mnt || fail remount
(cd /mnt && sha256sum -c -s /sums) || fail contents
rm -r /mnt/d1
fstrim -v /mnt || fail fstrim
umount /mnt || fail umount
echo "interop: disk is good"
"""
"""A file system made, filled, checked, mounted again, its files' sums compared, trimmed."""

NET_DRIVERS = ("e1000",)
NET = """\
mkdir /www && dd if=/dev/urandom of=/www/file bs=64k count=64 2> /dev/null
unshare -n sleep 1000 &
other=$!
sleep 0.3
ip link set eth1 netns $other || fail netns
there() { nsenter -t $other -n "$@"; }
there ip addr add 10.0.0.2/24 dev eth1
there ip link set eth1 up
ip addr add 10.0.0.1/24 dev eth0 && ip link set eth0 up
for i in 1 2 3 4 5 6 7 8 9 10; do ping -c 1 -W 1 10.0.0.2 > /dev/null && break; done
ping -c 5 -s 1400 10.0.0.2 || fail ping
there httpd -p 80 -h /www
httpd -p 80 -h /www
wget -q -O /there http://10.0.0.2/file || fail receive
there wget -q -O /back http://10.0.0.1/file || fail send
[ "$(sha256sum < /www/file)" = "$(sha256sum < /there)" ] || fail received bytes
[ "$(sha256sum < /www/file)" = "$(sha256sum < /back)" ] || fail sent bytes
grep eth0 /proc/interrupts
cat /proc/net/dev
echo "interop: net is good"
"""
"""Two cards of one guest on a cable, each with a network stack of its own: pings, 4 MiB by TCP each way."""
