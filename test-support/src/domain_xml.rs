//! The domain XML of a test's machine, as libvirt would write it.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::disk::{Attached, Bus};

/// What a machine says of itself.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    dir: PathBuf,
    pub(crate) disks: Vec<Attached>,
}

impl Described {
    pub(crate) fn new(kind: &str, dir: &Path, disks: Vec<Attached>) -> Self {
        let uuid = Uuid::new_v4();
        let name = format!("{kind}-{}", &uuid.simple().to_string()[..8]);
        Self {
            name,
            uuid,
            dir: dir.to_path_buf(),
            disks,
        }
    }

    pub(crate) fn disk(&self, target: &str) -> &Attached {
        let found = self.disks.iter().find(|x| x.spec.target == target);
        found.unwrap_or_else(|| panic!("{} has no disk {target}", self.name))
    }

    pub(crate) fn qmp_path(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    pub(crate) fn agent_path(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    pub(crate) fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("domain.xml");
        std::fs::write(&path, self.xml()).expect("the domain XML can be written");
        path
    }

    pub(crate) fn xml(&self) -> String {
        let mut disks = String::new();
        for disk in &self.disks {
            write_disk(&mut disks, disk);
        }
        format!(
            "<domain type='qemu' id='1'>\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>\n  \
             <metadata>\n    <disksnap:domain xmlns:disksnap='urn:disksnap:domain:1'>\n      \
             <disksnap:monitor path='{qmp}'/>\n      <disksnap:agent path='{agent}'/>\n    \
             </disksnap:domain>\n  </metadata>\n  \
             <memory unit='KiB'>393216</memory>\n  <currentMemory unit='KiB'>393216</currentMemory>\n  \
             <vcpu placement='static'>1</vcpu>\n  \
             <os>\n    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>\n    <boot dev='hd'/>\n  </os>\n  \
             <features>\n    <acpi/>\n  </features>\n  \
             <clock offset='utc'/>\n  <on_poweroff>destroy</on_poweroff>\n  \
             <on_reboot>restart</on_reboot>\n  <on_crash>destroy</on_crash>\n  \
             <devices>\n    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n{disks}{CDROM}{OTHERS}  \
             </devices>\n</domain>\n",
            name = self.name,
            uuid = self.uuid,
            qmp = escape(&self.qmp_path().to_string_lossy()),
            agent = escape(&self.agent_path().to_string_lossy()),
        )
    }
}

/// An empty drive, as most domains have one.
const CDROM: &str = "    <disk type='file' device='cdrom'>
      <driver name='qemu'/>
      <target dev='hdc' bus='sata'/>
      <readonly/>
      <alias name='sata0-0-2'/>
      <address type='drive' controller='0' bus='0' target='0' unit='2'/>
    </disk>
";

const OTHERS: &str = "    <controller type='pci' index='0' model='pcie-root'>
      <alias name='pcie.0'/>
    </controller>
    <controller type='sata' index='0'>
      <alias name='ide'/>
    </controller>
    <memballoon model='none'/>
";

fn write_disk(out: &mut String, disk: &Attached) {
    let spec = &disk.spec;
    let bus = match spec.bus {
        Bus::VirtioBlk => "virtio",
        Bus::VirtioScsi => "scsi",
    };
    let (kind, attribute) = if disk.is_device() {
        ("block", "dev")
    } else {
        ("file", "file")
    };
    let read_only = if spec.read_only { "      <readonly/>\n" } else { "" };
    let address = match spec.bus {
        Bus::VirtioBlk => format!(
            "<address type='pci' domain='0x0000' bus='0x00' slot='{:#04x}' function='{:#x}'/>",
            disk.pci_slot(),
            disk.pci_function()
        ),
        Bus::VirtioScsi => {
            format!(
                "<address type='drive' controller='0' bus='0' target='{}' unit='0'/>",
                disk.index
            )
        }
    };
    let written = write!(
        out,
        "    <disk type='{kind}' device='disk'>\n      \
         <driver name='qemu' type='{format}' discard='unmap'/>\n      \
         <source {attribute}='{image}' index='{index}'/>\n      <backingStore/>\n      \
         <target dev='{target}' bus='{bus}'/>\n{read_only}      \
         <serial>{serial}</serial>\n      <alias name='{alias}'/>\n      {address}\n    </disk>\n",
        format = spec.format.as_str(),
        image = escape(&disk.image.to_string_lossy()),
        index = disk.index + 1,
        target = spec.target,
        serial = disk.serial(),
        alias = disk.alias,
    );
    written.expect("a String takes any text");
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}
