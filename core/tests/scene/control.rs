//! A domain that writes down what is done to it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use disksnap_core::{
    Command, Connector, Control, Disk, DiskNode, Domain, Freeze, Guard, Host, Hotplug, ImageServer, Lend,
    LentDisk, NbdServer, Owner, Result, RunState, ServeNode, Verdict, Watch,
};
use serde_json::Value;

use super::{FakeImages, Log, Slots};

#[derive(Debug)]
pub(crate) struct FakeConnector {
    shared: Arc<Shared>,
    images: Arc<FakeImages>,
}

/// What stays of the domain between two connections.
#[derive(Debug)]
struct Shared {
    log: Arc<Log>,
    state: Mutex<RunState>,
    verdict: Mutex<Verdict>,
    instance: Mutex<String>,
    served: Mutex<BTreeSet<String>>,
    lent: Mutex<BTreeSet<String>>,
    watches: Mutex<Vec<Watch>>,
    slots: Slots,
}

impl FakeConnector {
    pub(crate) fn new(state: RunState, log: &Arc<Log>) -> Self {
        let shared = Shared {
            log: Arc::clone(log),
            state: Mutex::new(state),
            verdict: Mutex::new(Verdict::Quiet),
            instance: Mutex::new("1".to_owned()),
            served: Mutex::default(),
            lent: Mutex::default(),
            watches: Mutex::default(),
            slots: Slots::new(log),
        };
        Self {
            shared: Arc::new(shared),
            images: Arc::new(FakeImages::new(log)),
        }
    }

    /// What serves images on this host.
    pub(crate) fn images(&self) -> &FakeImages {
        &self.images
    }

    /// What can be plugged into the guest.
    pub(crate) fn slots(&self) -> &Slots {
        &self.shared.slots
    }

    pub(crate) fn set_state(&self, state: RunState) {
        *self.shared.state.lock().unwrap() = state;
    }

    /// The guard says this when it is let go.
    pub(crate) fn set_verdict(&self, verdict: Verdict) {
        *self.shared.verdict.lock().unwrap() = verdict;
    }

    /// Another run of the hypervisor: it serves nothing.
    pub(crate) fn restart(&self) {
        *self.shared.instance.lock().unwrap() += "1";
        self.shared.served.lock().unwrap().clear();
        self.shared.lent.lock().unwrap().clear();
    }

    /// How many disks the guest has lent.
    pub(crate) fn lent(&self) -> usize {
        self.shared.lent.lock().unwrap().len()
    }

    pub(crate) fn served(&self) -> Vec<String> {
        self.shared.served.lock().unwrap().iter().cloned().collect()
    }

    /// What the guards were told.
    pub(crate) fn watches(&self) -> Vec<Watch> {
        self.shared.watches.lock().unwrap().clone()
    }
}

#[async_trait]
impl Connector for FakeConnector {
    async fn control(&self, domain: &Domain) -> Result<Arc<dyn Control>> {
        Ok(Arc::new(FakeControl {
            domain: domain.clone(),
            shared: Arc::clone(&self.shared),
        }))
    }

    fn image_server(&self) -> Option<&dyn ImageServer> {
        Some(&*self.images)
    }
}

#[derive(Debug)]
struct FakeControl {
    domain: Domain,
    shared: Arc<Shared>,
}

impl FakeControl {
    fn note(&self, event: impl Into<String>) -> Result<()> {
        self.shared.log.note(event)
    }
}

#[async_trait]
impl Host for FakeControl {
    fn domain(&self) -> &Domain {
        &self.domain
    }

    async fn state(&self) -> Result<RunState> {
        Ok(self.shared.state.lock().unwrap().clone())
    }

    async fn monitor(&self, command: Command) -> Result<Value> {
        self.note(format!("monitor {} {}", command.execute, command.arguments))?;
        Ok(Value::Null)
    }

    async fn monitor_each(&self, commands: Vec<Command>) -> Result<Vec<Result<Value>>> {
        let mut answers = Vec::new();
        for command in commands {
            answers.push(self.monitor(command).await);
        }
        Ok(answers)
    }

    fn image_dir(&self) -> &Path {
        Path::new("/images")
    }

    async fn image_owner(&self) -> Result<Option<Owner>> {
        Ok(None)
    }
}

#[async_trait]
impl Control for FakeControl {
    async fn guard(&self, watch: Watch) -> Result<Box<dyn Guard>> {
        self.note("arm")?;
        self.shared.watches.lock().unwrap().push(watch);
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(FakeGuard { shared, armed: true }))
    }

    async fn freeze(&self, mountpoints: &[String], _: Duration) -> Result<Freeze> {
        self.note("freeze")?;
        Ok(Freeze {
            filesystems: 3,
            mountpoints: mountpoints.to_vec(),
        })
    }

    async fn thaw(&self) -> Result<()> {
        self.note("thaw")
    }

    async fn pause(&self) -> Result<()> {
        self.note("pause")
    }

    async fn resume(&self) -> Result<()> {
        self.note("resume")
    }

    async fn let_go(&self) -> Result<()> {
        Ok(())
    }

    async fn come_to_rest(&self) -> Result<()> {
        Ok(())
    }

    async fn flush_nodes(&self, disks: &[&Disk]) -> Result<Vec<DiskNode>> {
        let node = |disk: &&Disk| DiskNode {
            target: disk.target.clone(),
            node: format!("node-{}", disk.target),
        };
        Ok(disks.iter().map(node).collect())
    }

    async fn flush(&self, nodes: &[DiskNode]) -> Result<()> {
        let nodes: Vec<&str> = nodes.iter().map(|n| n.node.as_str()).collect();
        self.note(format!("flush {}", nodes.join(" ")))
    }

    async fn instance(&self) -> Result<Option<String>> {
        Ok(Some(self.shared.instance.lock().unwrap().clone()))
    }

    fn default_socket(&self) -> PathBuf {
        "/run/vm.sock".into()
    }

    async fn start_server(&self, server: &NbdServer) -> Result<()> {
        self.note(format!("start server {}", server.listen))
    }

    async fn stop_server(&self) -> Result<()> {
        self.shared.served.lock().unwrap().clear();
        self.note("stop server")
    }

    async fn serve(&self, node: &ServeNode) -> Result<()> {
        self.note(format!("serve {}", node.name))?;
        self.shared.served.lock().unwrap().insert(node.id.clone());
        Ok(())
    }

    async fn unserve(&self, id: &str) -> Result<()> {
        self.note(format!("unserve {id}"))?;
        self.shared.served.lock().unwrap().remove(id);
        Ok(())
    }

    async fn served(&self) -> Result<Vec<String>> {
        Ok(self.shared.served.lock().unwrap().iter().cloned().collect())
    }

    fn hotplug(&self) -> Option<&dyn Hotplug> {
        Some(&self.shared.slots)
    }

    fn lends(&self) -> Option<&dyn Lend> {
        Some(self)
    }
}

/// Disks that are lent, by the name of their stand-in.
#[async_trait]
impl Lend for FakeControl {
    async fn look(&self, disk: &Disk, name: &str) -> Result<LentDisk> {
        self.note(format!("look {}", disk.target))?;
        Ok(LentDisk {
            target: disk.target.clone(),
            device: format!("/{}", disk.target),
            node: format!("node-{}", disk.target),
            stand_in: name.to_owned(),
            thread: None,
            size: 1 << 20,
            export: ServeNode {
                id: name.to_owned(),
                node: format!("node-{}", disk.target),
                name: disk.target.clone(),
                bitmap: None,
            },
        })
    }

    async fn lend(&self, disk: &LentDisk) -> Result<()> {
        self.shared.lent.lock().unwrap().insert(disk.stand_in.clone());
        self.note(format!("lend {}", disk.target))
    }

    async fn serve_writable(&self, disk: &LentDisk) -> Result<()> {
        self.shared.served.lock().unwrap().insert(disk.export.id.clone());
        self.note(format!("serve writable {}", disk.export.name))
    }

    async fn give_back(&self, disk: &LentDisk) -> Result<()> {
        self.note(format!("give back {}", disk.target))?;
        self.shared.lent.lock().unwrap().remove(&disk.stand_in);
        Ok(())
    }

    async fn is_lent(&self, disk: &LentDisk) -> Result<bool> {
        Ok(self.shared.lent.lock().unwrap().contains(&disk.stand_in))
    }
}

#[derive(Debug)]
struct FakeGuard {
    shared: Arc<Shared>,
    armed: bool,
}

#[async_trait]
impl Guard for FakeGuard {
    async fn disarm(mut self: Box<Self>) -> Result<Verdict> {
        self.shared.log.note("disarm")?;
        self.armed = false;
        Ok(*self.shared.verdict.lock().unwrap())
    }
}

impl Drop for FakeGuard {
    /// A guard that is dropped while it is armed lets the guest go.
    fn drop(&mut self) {
        if self.armed {
            let _ = self.shared.log.note("guard acts");
        }
    }
}
