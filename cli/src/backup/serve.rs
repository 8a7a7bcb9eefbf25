//! `disksnap backup serve`: an instant look at a point, over NBD.

use clap::Args;
use disksnap::StateDir;
use disksnap_backup::{PointServer, ServeRequest, ServedDisk};
use serde::Serialize;

use crate::args::Place;
use crate::backup::args::{Point, Repo};
use crate::backup::create::no_xml;
use crate::backup::{folder, repository};
use crate::context::Context;
use crate::export::tls;
use crate::failure::{Failure, Outcome};
use crate::output::{Text, fields, size, table};
use crate::signals::Stop;

/// Which point, which disks, and where.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) repo: Repo,
    #[command(flatten)]
    pub(crate) point: Point,
    /// A disk of the point, by its target; may be given several times; all disks if none is given
    #[arg(long = "disk", value_name = "TARGET")]
    pub(crate) disks: Vec<String>,
    #[command(flatten)]
    pub(crate) place: Place,
}

pub(crate) async fn run(context: &Context, serve: Serve) -> Outcome {
    let repository = repository(&serve.repo).await?;
    let folder = folder(context, &repository).await?;
    let request = ServeRequest {
        targets: serve.disks,
        tls: tls(&serve.place)?,
        listen: serve.place.listen,
        allow_remote: serve.place.allow_remote,
        run: StateDir::open(context.global.state_dir.as_deref())?.run(),
    };
    let stop = Stop::listen(false)?;
    let mut server = tokio::select! {
        started = disksnap_backup::serve(&repository, &folder, &serve.point.point, &request) => started?,
        signal = stop.wait() => return Err(Failure::Stopped(signal)),
    };
    context.out.show(&ServedView::new(&server), no_xml)?;
    tokio::select! {
        error = server.ended() => Err(error.into()),
        signal = stop.wait() => {
            server.stop().await?;
            Err(Failure::Stopped(signal))
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServedView {
    domain: String,
    point: String,
    listen: String,
    /// The directory of its credentials.
    tls: Option<String>,
    verify_client: bool,
    /// The only clients that are let in; left out where everyone whose certificate is verified is.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    allowed_clients: Vec<String>,
    disks: Vec<ServedDisk>,
}

impl ServedView {
    fn new(server: &PointServer) -> Self {
        Self {
            domain: server.point().domain.name.clone(),
            point: server.point().point.clone(),
            listen: server.listen().to_string(),
            tls: server.tls().map(|tls| tls.credentials.display().to_string()),
            verify_client: server.tls().is_some_and(|tls| tls.verify_client),
            allowed_clients: server
                .tls()
                .map(|tls| tls.allowed.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            disks: server.disks().to_vec(),
        }
    }
}

impl Text for ServedView {
    fn text(&self) -> String {
        let tls = match (&self.tls, self.verify_client) {
            (None, _) => "none".to_owned(),
            (Some(directory), true) if !self.allowed_clients.is_empty() => {
                format!("{directory}, only for {}", self.allowed_clients.join("; "))
            }
            (Some(directory), true) => format!("{directory}, clients are verified"),
            (Some(directory), false) => format!("{directory}, clients are not verified"),
        };
        let mut out = fields(
            "",
            [
                ("domain", self.domain.clone()),
                ("point", self.point.clone()),
                ("listens on", self.listen.clone()),
                ("TLS", tls),
                ("serves", "read-only, until Ctrl-C".to_owned()),
            ],
        );
        let mut rows = vec![["DISK", "SIZE", "IMAGES", "URI"].map(str::to_owned).to_vec()];
        rows.extend(self.disks.iter().map(|disk| {
            let (target, uri) = (disk.target.clone(), disk.uri.clone());
            vec![target, size(disk.size), disk.images.to_string(), uri]
        }));
        out.push('\n');
        out.push_str(&table(&rows));
        out
    }
}
