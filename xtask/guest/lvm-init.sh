#!/bin/busybox sh
# PID 1 of the guest that has LVM: makes the place that lvm2 expects, then carries out what the test on the
# other side of the port says (guest/runner.rs). What goes wrong is said as GUEST FAILED.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp

mkdir -p /usr
for place in /sbin /usr/bin /usr/sbin; do
    ln -s /bin "$place"
done
for name in lvs vgs pvs lvcreate lvremove lvchange lvconvert lvextend lvreduce lvrename vgcreate vgremove vgchange pvcreate; do
    ln -s lvm "/bin/$name"
done
for name in thin_check thin_delta thin_dump thin_repair; do
    ln -s pdata_tools "/bin/$name"
done
# By their own names: busybox has smaller ones of some.
ln -sf mke2fs /bin/mkfs.ext4
mkdir -p /etc/lvm /run/lock/lvm /run/lvm
ln -sf /proc/self/mounts /etc/mtab
# There is no udev, nothing that polls or monitors, and nothing worth an archive. The rest is for speed, since a test runs
# hundreds of commands: reading without aio, whose end waits for other processors' leave, and no memory set aside for
# the moments in which the root file system's own volume stands still.
cat > /etc/lvm/lvm.conf << 'END'
activation { udev_sync=0 udev_rules=0 verify_udev_operations=1 monitoring=0 reserved_memory=0 reserved_stack=0 process_priority=0 }
devices { obtain_device_list_from_udev=0 external_device_info_source="none" multipath_component_detection=0 md_component_detection=0 use_devicesfile=0 }
global { use_lvmpolld=0 event_activation=0 use_aio=0 }
backup { backup=0 archive=0 }
END
# Taking a device away waits for all readers of the kernel's lists: this has them hurried.
echo 1 > /sys/kernel/rcu_expedited

while read -r module; do
    insmod "/modules/$module" || echo "GUEST FAILED: cannot load $module"
done < /modules/order

port() {
    for port in /sys/class/virtio-ports/*; do
        [ -e "$port/name" ] || continue
        read -r name < "$port/name" || continue
        [ "$name" = disksnap.test ] && echo "/dev/${port##*/}"
    done
}
tries=0
until port=$(port) && [ -n "$port" ] && [ -e "$port" ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || { echo "GUEST FAILED: no port for the test"; break; }
    usleep 10000
done
read -r up _ < /proc/uptime
echo "GUEST: ready after $up s"
exec guest-runner "$port"
