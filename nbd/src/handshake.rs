//! The handshake: from a fresh stream to an export ready for requests (fixed newstyle, `proto.md`).

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Error, Refusal, Result};
use crate::tls::{self, TlsCredentials};
use crate::uri::Uri;
use crate::wire::{
    self, BlockSizes, Greeting, Info, ListedExport, MAX_OPTION_REPLIES, MAX_OPTION_TOTAL, MAX_STRING, Opt,
    OptionReply, TransmissionFlags, Violation,
};

/// Anything that carries bytes both ways.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream of whatever kind.
pub(crate) type BoxedStream = Box<dyn Stream>;

/// What the two sides agreed on. It does not change while the connection lasts.
#[derive(Debug)]
pub(crate) struct Session {
    /// The export's URI, for texts.
    pub(crate) target: Arc<str>,
    pub(crate) size: u64,
    pub(crate) flags: TransmissionFlags,
    pub(crate) block_sizes: Option<BlockSizes>,
    pub(crate) description: Option<Box<str>>,
    pub(crate) structured: bool,
    /// Id and name of each metadata context.
    pub(crate) contexts: Vec<(u32, String)>,
}

/// A reply that is neither the final acknowledgement nor an error.
type Reply = (u32, Vec<u8>);
/// A server's no, with its words.
type No = (Refusal, Option<Box<str>>);

/// A stream on which options are being haggled over.
pub(crate) struct Negotiation {
    stream: BoxedStream,
    target: Arc<str>,
    greeting: Greeting,
    /// TLS was just set up and the server has not answered through it: with TLS 1.3 the server
    /// judges our certificate only after we think that all is well.
    unproven_tls: bool,
}

impl Negotiation {
    /// Exchanges the greeting, and sets up TLS where the URI or the credentials ask for it.
    pub(crate) async fn begin(
        stream: BoxedStream,
        uri: &Uri,
        target: Arc<str>,
        credentials: Option<&TlsCredentials>,
    ) -> Result<Self> {
        check_name(uri.export(), &target)?;
        let greeting = Greeting { no_zeroes: false };
        let mut this = Self {
            stream,
            target,
            greeting,
            unproven_tls: false,
        };
        let mut bytes = [0; Greeting::LENGTH];
        this.receive(&mut bytes).await?;
        this.greeting = this.checked(Greeting::parse(&bytes))?;
        this.send(&this.greeting.answer()).await?;
        match credentials {
            Some(credentials) => this.start_tls(uri, credentials).await,
            None if uri.tls() => Err(Error::Credentials {
                path: "ca-cert.pem".into(),
                reason: format!(
                    "none were given, and {} requires TLS: set ConnectOptions::tls",
                    this.target
                ),
            }),
            None => Ok(this),
        }
    }

    async fn start_tls(mut self, uri: &Uri, credentials: &TlsCredentials) -> Result<Self> {
        let Some(name) = uri.tls_server_name() else {
            return Err(Error::InvalidUri {
                uri: uri.to_string(),
                reason: "TLS over a unix socket needs the name in the server's certificate: add \
                         tls-hostname=NAME"
                    .to_owned(),
            });
        };
        if let Err((refusal, message)) = self.option(Opt::StartTls, &[]).await? {
            let refusal = match refusal {
                Refusal::ShuttingDown => refusal,
                _ => Refusal::NoTls,
            };
            return Err(self.refused((refusal, message)));
        }
        let target = Arc::clone(&self.target);
        let secured = credentials.secure(self.stream, name).await;
        let stream = secured.map_err(|e| Error::Tls {
            target,
            source: Arc::new(e),
        })?;
        Ok(Self {
            stream,
            unproven_tls: true,
            ..self
        })
    }

    /// Enters transmission: structured replies and the metadata contexts as far as the server has
    /// them, then the export.
    pub(crate) async fn go(mut self, export: &str, contexts: &[String]) -> Result<(BoxedStream, Session)> {
        let structured = self.structured_replies().await?;
        let contexts = if structured && !contexts.is_empty() {
            self.set_contexts(export, contexts).await?
        } else {
            Vec::new()
        };
        let mut session = Session {
            target: Arc::clone(&self.target),
            size: 0,
            flags: TransmissionFlags::empty(),
            block_sizes: None,
            description: None,
            structured,
            contexts,
        };
        match self.option(Opt::Go, &wire::go_data(export)).await? {
            Ok(replies) => self.take_infos(&mut session, &replies)?,
            Err((Refusal::Unsupported, _)) => self.export_name(export, &mut session).await?,
            Err(no) => return Err(self.refused(no)),
        }
        Ok((self.stream, session))
    }

    /// Whether the server will use structured replies.
    async fn structured_replies(&mut self) -> Result<bool> {
        match self.option(Opt::StructuredReply, &[]).await? {
            Ok(_) => Ok(true),
            // No other option would fare better.
            Err(no @ (Refusal::TlsRequired | Refusal::ShuttingDown, _)) => Err(self.refused(no)),
            Err(_) => Ok(false),
        }
    }

    async fn set_contexts(&mut self, export: &str, queries: &[String]) -> Result<Vec<(u32, String)>> {
        let data = self.context_data(export, queries)?;
        let Ok(replies) = self.option(Opt::SetMetaContext, &data).await? else {
            // It has none at all, or none for this export: what is missing shows at the first use,
            // and an export that does not exist shows at once in the next option.
            return Ok(Vec::new());
        };
        let mut granted: Vec<(u32, String)> = Vec::new();
        for (kind, data) in replies {
            let (id, name) = self.checked(context_reply(kind, &data))?;
            if !queries.contains(&name) || granted.iter().any(|(i, n)| *i == id || *n == name) {
                let name = wire::printable(name.as_bytes()).unwrap_or_default();
                return Err(self.broken(&format!("it grants the metadata context {name:?} unasked")));
            }
            granted.push((id, name));
        }
        Ok(granted)
    }

    fn take_infos(&self, session: &mut Session, replies: &[Reply]) -> Result<()> {
        let mut described = false;
        for (kind, data) in replies {
            if *kind != wire::REP_INFO {
                return Err(self.broken(&format!("a reply of type {kind} to Go")));
            }
            match self.checked(Info::parse(data))? {
                Info::Export { size, flags } => {
                    (session.size, session.flags, described) = (size, flags, true);
                }
                Info::BlockSizes(sizes) => session.block_sizes = Some(sizes),
                Info::Description(text) => session.description = text,
                Info::Other => {}
            }
        }
        if described {
            Ok(())
        } else {
            Err(self.broken("it accepts the export without saying its size"))
        }
    }

    /// The old way in, for servers that do not know `NBD_OPT_GO`: it cannot say why it refuses.
    async fn export_name(&mut self, export: &str, session: &mut Session) -> Result<()> {
        self.send(&wire::option(Opt::ExportName, export.as_bytes()))
            .await?;
        let mut reply = [0; 134];
        let reply = &mut reply[..wire::export_name_reply_length(self.greeting)];
        match self.stream.read_exact(reply).await {
            Ok(_) => {}
            Err(error) if is_end(&error) => return Err(self.refused((Refusal::UnknownExport, None))),
            Err(error) => return Err(self.io_error(error)),
        }
        (session.size, session.flags) = self.checked(wire::parse_export_name_reply(reply))?;
        Ok(())
    }

    /// `NBD_OPT_LIST`, then goodbye.
    pub(crate) async fn list(mut self) -> Result<Vec<ListedExport>> {
        let replies = match self.option(Opt::List, &[]).await? {
            Ok(replies) => replies,
            Err(no) => return Err(self.refused(no)),
        };
        let exports = replies.iter().map(|(kind, data)| match *kind {
            wire::REP_SERVER => wire::parse_listed_export(data),
            kind => wire::violation(format!("a reply of type {kind} to List")),
        });
        let exports = self.checked(exports.collect())?;
        self.abort().await;
        Ok(exports)
    }

    /// `NBD_OPT_LIST_META_CONTEXT`, then goodbye. No query means all contexts.
    pub(crate) async fn list_contexts(mut self, export: &str, queries: &[String]) -> Result<Vec<String>> {
        if !self.structured_replies().await? {
            let feature = "structured replies, and so no metadata contexts";
            return Err(Error::Unsupported {
                target: self.target,
                feature,
            });
        }
        let data = self.context_data(export, queries)?;
        let replies = match self.option(Opt::ListMetaContext, &data).await? {
            Ok(replies) => replies,
            Err(no) => return Err(self.refused(no)),
        };
        let names = replies
            .iter()
            .map(|(kind, data)| Ok(context_reply(*kind, data)?.1));
        let names = self.checked(names.collect())?;
        self.abort().await;
        Ok(names)
    }

    /// Ends the haggling politely. A server may answer or just close: neither matters any more.
    async fn abort(mut self) {
        if self.send(&wire::option(Opt::Abort, &[])).await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
    }

    fn context_data(&self, export: &str, queries: &[String]) -> Result<Vec<u8>> {
        for query in queries {
            check_name(query, &self.target)?;
        }
        Ok(wire::meta_context_data(export, queries))
    }

    /// Sends an option and collects its replies up to the final one.
    async fn option(&mut self, opt: Opt, data: &[u8]) -> Result<Result<Vec<Reply>, No>> {
        self.send(&wire::option(opt, data)).await?;
        let (mut replies, mut total) = (Vec::new(), 0);
        loop {
            let mut header = [0; OptionReply::LENGTH];
            self.receive(&mut header).await?;
            self.unproven_tls = false;
            let reply = self.checked(OptionReply::parse(&header, opt))?;
            let mut data = vec![0; reply.length as usize];
            self.receive(&mut data).await?;
            if let Some(refusal) = reply.refusal() {
                return Ok(Err((refusal, wire::printable(&data))));
            }
            if reply.kind == wire::REP_ACK {
                return Ok(Ok(replies));
            }
            total += data.len();
            replies.push((reply.kind, data));
            if total > MAX_OPTION_TOTAL || replies.len() > MAX_OPTION_REPLIES {
                return Err(self.broken(&format!(
                    "more than {MAX_OPTION_REPLIES} replies or {MAX_OPTION_TOTAL} bytes to {opt:?}"
                )));
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let sent = match self.stream.write_all(bytes).await {
            Ok(()) => self.stream.flush().await,
            Err(error) => Err(error),
        };
        sent.map_err(|error| self.io_error(error))
    }

    async fn receive(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.stream.read_exact(buffer).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.io_error(error)),
        }
    }

    fn io_error(&self, error: io::Error) -> Error {
        let target = Arc::clone(&self.target);
        if tls::is_tls_error(&error) || self.unproven_tls {
            return Error::Tls {
                target,
                source: Arc::new(error),
            };
        }
        let reason = if is_end(&error) {
            "the server hung up during the handshake"
        } else {
            "it broke during the handshake"
        };
        Error::Disconnected {
            target,
            reason,
            source: Some(Arc::new(error)),
        }
    }

    fn refused(&self, (refusal, message): No) -> Error {
        Error::Refused {
            target: Arc::clone(&self.target),
            refusal,
            message,
        }
    }

    fn checked<T>(&self, result: Result<T, Violation>) -> Result<T> {
        result.map_err(|Violation(text)| self.broken(&text))
    }

    fn broken(&self, text: &str) -> Error {
        Error::Protocol {
            target: Arc::clone(&self.target),
            violation: text.into(),
        }
    }
}

fn context_reply(kind: u32, data: &[u8]) -> wire::Checked<(u32, String)> {
    match kind {
        wire::REP_META_CONTEXT => wire::parse_meta_context(data),
        kind => wire::violation(format!("a reply of type {kind} to a query for metadata contexts")),
    }
}

/// The peer hung up, in one of the ways this shows.
pub(crate) fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe
    )
}

/// Names that cannot be sent are refused before anything is.
fn check_name(name: &str, target: &Arc<str>) -> Result<()> {
    if name.len() <= MAX_STRING && !name.contains('\0') {
        return Ok(());
    }
    Err(Error::InvalidUri {
        uri: target.to_string(),
        reason: format!("a name must have at most {MAX_STRING} bytes and no NUL character"),
    })
}
