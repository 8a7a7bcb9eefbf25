#!/bin/busybox sh
# PID 1 of the test guest. What it does is said on the kernel's command line:
#   writer=DEV[,DEV…]   an endless writer on raw disks; prints WRITER n
#   fs=TYPE:DEV         a file system on DEV, mounted at /mnt, and a writer of files; prints FILES n
# The guest agent runs whenever QEMU gives it a port. What goes wrong is said as GUEST FAILED.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run

option() {
    read -r line < /proc/cmdline
    for word in $line; do
        case $word in "$1="*) echo "${word#*=}" ;; esac
    done
}
files=$(option fs)

while read -r module; do
    # It is big, and few want it.
    case $module:$files in xfs.ko:xfs:*) ;; xfs.ko:*) continue ;; esac
    insmod "/modules/$module" || echo "GUEST FAILED: cannot load $module"
done < /modules/order

# SCSI disks are found in the background.
wait_for() {
    tries=0
    while [ ! -e "$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 3000 ] || { echo "GUEST FAILED: no $1"; return 1; }
        usleep 10000
    done
}

agent_port() {
    for port in /sys/class/virtio-ports/*; do
        [ -e "$port/name" ] || continue
        read -r name < "$port/name" || continue
        [ "$name" = org.qemu.guest_agent.0 ] && echo "/dev/${port##*/}"
    done
}

start_agent() {
    tries=0
    until port=$(agent_port) && [ -n "$port" ] && [ -e "$port" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || { echo "GUEST FAILED: no port for the agent"; return; }
        usleep 10000
    done
    /bin/qemu-ga -m virtio-serial -p "$port" -t /run &
}

start_files() {
    kind=${1%%:*}
    device=${1#*:}
    wait_for "$device" || return
    case $kind in
        # By its path: busybox has a smaller one of the same name built in.
        ext4) /bin/mke2fs -q -F -t ext4 -E nodiscard "$device" ;;
        xfs) mkfs.xfs -q -K "$device" ;;
        *) echo "GUEST FAILED: no program makes $kind here" && return ;;
    esac
    mount -t "$kind" "$device" /mnt || { echo "GUEST FAILED: cannot mount $device"; return; }
    guest-writer files /mnt &
}

start_writer() {
    devices=$(echo "$1" | tr , ' ')
    for device in $devices; do
        wait_for "$device" || return
    done
    # shellcheck disable=SC2086 # each device is a word
    guest-writer disks $devices &
}

start_agent
[ -z "$files" ] || start_files "$files"
disks=$(option writer)
[ -z "$disks" ] || start_writer "$disks"
read -r up _ < /proc/uptime
echo "GUEST: ready after $up s"
while :; do
    wait
    sleep 3600
done
