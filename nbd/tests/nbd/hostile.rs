//! Servers that lie. Here a fake is right: no real server can be asked to.
//!
//! Each test says what a server sends, and checks that the client says which lie it was: no hang, no
//! panic, no answer that is not one.

use std::time::Duration;

use disksnap_nbd::{
    BASE_ALLOCATION, BulkOptions, BulkReader, Client, CommandFlags, ConnectOptions, Errno, Error, Refusal,
    Uri, list_exports,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use crate::server::directory;

const ACK: u32 = 1;
const INFO: u32 = 3;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const CONTEXT: u32 = 10;
const UNSUPPORTED: u32 = (1 << 31) + 1;
const DONE: u16 = 1;
const SIZE: u64 = 1 << 20;

/// What a server does, step by step; at the end it hangs up.
#[derive(Default)]
struct Script(Vec<Step>);

enum Step {
    Send(Vec<u8>),
    /// Until so many requests have come.
    Requests(usize),
    /// Not another word, and no hanging up.
    Silence,
}

impl Script {
    fn send(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.0.push(Step::Send(bytes.into()));
        self
    }

    fn greeting() -> Self {
        Self::default().send(&b"NBDMAGICIHAVEOPT\x00\x03"[..])
    }

    fn option(self, option: u32, kind: u32, data: &[u8]) -> Self {
        let length = u32::try_from(data.len()).unwrap();
        self.option_of_length(option, kind, length).send(data)
    }

    fn option_of_length(self, option: u32, kind: u32, length: u32) -> Self {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        for field in [option, kind, length] {
            bytes.extend(field.to_be_bytes());
        }
        self.send(bytes)
    }

    fn export(self, size: u64) -> Self {
        self.export_with(size, 0b0110_1101)
    }

    fn export_with(self, size: u64, flags: u16) -> Self {
        let flags = flags.to_be_bytes();
        self.option(GO, INFO, &[&[0, 0], &size.to_be_bytes()[..], &flags[..]].concat())
    }

    fn context(self, id: u32, name: &str) -> Self {
        self.option(CONTEXT, 4, &[&id.to_be_bytes(), name.as_bytes()].concat())
    }

    /// A good handshake, structured replies and `base:allocation` as context 1.
    fn structured() -> Self {
        Self::structured_of(SIZE)
    }

    fn structured_of(size: u64) -> Self {
        Self::greeting()
            .option(STRUCTURED, ACK, &[])
            .context(1, BASE_ALLOCATION)
            .option(CONTEXT, ACK, &[])
            .export(size)
            .option(GO, ACK, &[])
    }

    /// A good handshake of an old server.
    fn simple() -> Self {
        Self::greeting()
            .option(STRUCTURED, UNSUPPORTED, &[])
            .export(SIZE)
            .option(GO, ACK, &[])
    }

    fn requests(mut self, count: usize) -> Self {
        self.0.push(Step::Requests(count));
        self
    }

    fn silence(mut self) -> Self {
        self.0.push(Step::Silence);
        self
    }

    fn simple_reply(self, error: u32, cookie: u64, data: &[u8]) -> Self {
        self.send(
            [
                &0x6744_6698_u32.to_be_bytes(),
                &error.to_be_bytes(),
                &cookie.to_be_bytes()[..],
                data,
            ]
            .concat(),
        )
    }

    fn chunk(self, flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Self {
        self.chunk_of_length(flags, kind, cookie, u32::try_from(payload.len()).unwrap())
            .send(payload)
    }

    fn chunk_of_length(self, flags: u16, kind: u16, cookie: u64, length: u32) -> Self {
        let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
        bytes.extend([flags.to_be_bytes(), kind.to_be_bytes()].concat());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.send(bytes)
    }

    fn data(self, flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Self {
        self.chunk(flags, 1, cookie, &[&offset.to_be_bytes(), data].concat())
    }

    fn hole(self, flags: u16, cookie: u64, offset: u64, length: u32) -> Self {
        self.chunk(
            flags,
            2,
            cookie,
            &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat(),
        )
    }

    fn status(self, flags: u16, cookie: u64, context: u32, extents: &[(u32, u32)]) -> Self {
        let mut payload = context.to_be_bytes().to_vec();
        for (length, state) in extents {
            payload.extend([length.to_be_bytes(), state.to_be_bytes()].concat());
        }
        self.chunk(flags, 5, cookie, &payload)
    }

    fn error(self, flags: u16, kind: u16, cookie: u64, errno: u32, message: &[u8]) -> Self {
        let length = u16::try_from(message.len()).unwrap();
        self.chunk(
            flags,
            kind,
            cookie,
            &[&errno.to_be_bytes(), &length.to_be_bytes()[..], message].concat(),
        )
    }

    /// A server that follows the script with everyone who connects.
    fn serve(self) -> Fake {
        self.serve_then(Vec::new())
    }

    /// A server that follows the script with who connects first, the next one with the next, and the last with all others.
    fn serve_then(self, others: Vec<Self>) -> Fake {
        let directory = directory();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut others = others.into_iter();
        let mut script = self;
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = Vec::new();
                for step in &script.0 {
                    match step {
                        Step::Send(bytes) => {
                            if stream.write_all(bytes).await.is_err() {
                                break;
                            }
                        }
                        Step::Requests(count) => {
                            let magic = 0x2560_9513_u32.to_be_bytes();
                            while seen.windows(4).filter(|window| *window == magic).count() < *count {
                                if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                                    break;
                                }
                            }
                        }
                        Step::Silence => {
                            while stream.read_buf(&mut seen).await.unwrap_or(0) > 0 {
                                seen.clear();
                            }
                        }
                    }
                }
                // Hanging up with words of the client unread would take back our own.
                let _ = stream.shutdown().await;
                while stream.read_buf(&mut seen).await.unwrap_or(0) > 0 {
                    seen.clear();
                }
                script = others.next().unwrap_or(script);
            }
        });
        Fake {
            uri: Uri::unix(path, "vda"),
            _directory: directory,
        }
    }
}

struct Fake {
    uri: Uri,
    _directory: TempDir,
}

impl Fake {
    async fn connect(&self) -> Result<Client, Error> {
        let options = ConnectOptions {
            meta_contexts: vec![BASE_ALLOCATION.to_owned()],
            handshake_timeout: Duration::from_secs(20),
            idle_timeout: Some(Duration::from_secs(20)),
            ..ConnectOptions::default()
        };
        Client::connect(&self.uri, &options).await
    }

    /// The text of the violation that one read of 4096 bytes at 0 gives, or none.
    async fn read(&self) -> Result<Vec<u8>, Error> {
        self.connect()
            .await?
            .read(0, 4096)
            .await
            .map(|bytes| bytes.to_vec())
    }

    async fn status(&self) -> Result<usize, Error> {
        let client = self.connect().await?;
        client
            .block_status(4096, 4096, BASE_ALLOCATION)
            .await
            .map(|extents| extents.len())
    }
}

#[track_caller]
fn assert_violation<T: std::fmt::Debug>(result: Result<T, Error>, part: &str) {
    match result {
        Err(Error::Protocol { violation, .. }) if violation.contains(part) => {}
        other => panic!("expected a violation with {part:?}, got {other:?}"),
    }
}

#[track_caller]
fn assert_disconnected<T: std::fmt::Debug>(result: Result<T, Error>, part: &str) {
    match result {
        Err(Error::Disconnected { reason, .. }) if reason.contains(part) => {}
        other => panic!("expected a disconnection with {part:?}, got {other:?}"),
    }
}

#[tokio::test]
async fn handshakes() {
    let connect = async |script: Script| script.serve().connect().await.map(|_| ());
    let old = |data: &[u8]| Script::default().send(data);
    assert_violation(connect(old(b"220 mail.example ESMTP")).await, "another service");
    assert_violation(connect(old(b"NBDMAGICIHAVEOPT\x00\x00")).await, "fixed newstyle");
    assert_disconnected(connect(old(b"NBDMAGIC")).await, "during the handshake");
    assert_disconnected(connect(Script::greeting()).await, "during the handshake");

    let go = || Script::greeting().option(STRUCTURED, UNSUPPORTED, &[]);
    assert_violation(
        connect(go().option(STRUCTURED, ACK, &[])).await,
        "answers option 8 when asked for Go",
    );
    assert_violation(
        connect(go().option_of_length(GO, INFO, u32::MAX)).await,
        "a reply of 4294967295 bytes",
    );
    assert_violation(
        connect(go().option(GO, INFO, &[0, 0, 1]).option(GO, ACK, &[])).await,
        "too short",
    );
    assert_violation(
        connect(go().option(GO, ACK, &[])).await,
        "without saying its size",
    );
    assert_violation(
        connect(go().export(u64::MAX).option(GO, ACK, &[])).await,
        "impossible export size",
    );
    assert_violation(
        connect(go().option(GO, 2, &[]).option(GO, ACK, &[])).await,
        "a reply of type 2",
    );
    let sizes: Vec<u8> = [0_u32, 0, 0].iter().flat_map(|n| n.to_be_bytes()).collect();
    let sizes = [&[0, 3], &sizes[..]].concat();
    assert_violation(
        connect(go().option(GO, INFO, &sizes).option(GO, ACK, &[])).await,
        "impossible block sizes",
    );
    let text = [&b"go \x1b[2J away "[..], &[b'!'; 3000]].concat();
    let error = connect(go().option(GO, (1 << 31) + 2, &text)).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Refused {
                refusal: Refusal::Policy,
                ..
            }
        ),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(text.contains("go \\u{1b}[2J away") && text.len() < 1000, "{text}");
}

#[tokio::test]
async fn contexts_nobody_asked_for() {
    let haggling = || Script::greeting().option(STRUCTURED, ACK, &[]);
    for script in [
        haggling().context(1, "base:secrets").option(CONTEXT, ACK, &[]),
        haggling()
            .context(1, BASE_ALLOCATION)
            .context(2, BASE_ALLOCATION)
            .option(CONTEXT, ACK, &[]),
    ] {
        assert_violation(script.serve().connect().await.map(|_| ()), "unasked");
    }
}

#[tokio::test]
async fn a_list_of_exports_without_end() {
    let entry = [&4000_u32.to_be_bytes()[..], &[b'x'; 4000]].concat();
    let mut script = Script::greeting();
    for _ in 0..1200 {
        script = script.option(3, 2, &entry);
    }
    let fake = script.silence().serve();
    let listed = list_exports(&fake.uri, &ConnectOptions::default()).await;
    assert_violation(listed, "more than");
    let lying = Script::greeting()
        .option(3, 2, &100_u32.to_be_bytes())
        .option(3, ACK, &[])
        .serve();
    assert_violation(
        list_exports(&lying.uri, &ConnectOptions::default()).await,
        "shorter than it says",
    );
}

#[tokio::test]
async fn replies_that_answer_nothing() {
    let read = async |script: Script| script.serve().read().await;
    let base = || Script::structured().requests(1);
    assert_violation(read(base().send([0xff; 64])).await, "unknown magic");
    assert_violation(
        read(base().hole(DONE, 77, 0, 4096)).await,
        "request 77, which is not in flight",
    );
    assert_violation(
        read(base().simple_reply(0, 0, &[0; 4096])).await,
        "must be structured",
    );
    assert_violation(read(base().chunk(DONE, 3, 0, &[])).await, "unknown type 3");
    assert_violation(
        read(base().status(DONE, 0, 1, &[(4096, 0)])).await,
        "in answer to a read",
    );
    assert_violation(read(base().chunk(0, 0, 0, &[])).await, "a None chunk");
    let twice = base().hole(DONE, 0, 0, 4096).hole(DONE, 0, 0, 4096);
    let client = twice.serve().connect().await.unwrap();
    client.read(0, 4096).await.unwrap();
    assert_violation(client.read(0, 4096).await, "not in flight");
    let simple = Script::simple().requests(1).hole(DONE, 0, 0, 4096);
    assert_violation(read(simple).await, "not agreed on");
}

#[tokio::test]
async fn data_that_was_not_asked_for() {
    let read = async |script: Script| script.serve().read().await;
    let base = || Script::structured().requests(1);
    assert_violation(read(base().data(DONE, 0, 0, &[1; 4097])).await, "4105 bytes");
    assert_violation(
        read(base().chunk_of_length(DONE, 1, 0, u32::MAX).silence()).await,
        "4294967295 bytes",
    );
    assert_violation(
        read(base().data(DONE, 0, 4000, &[1; 200])).await,
        "200 bytes at 4000",
    );
    assert_violation(
        read(base().data(DONE, 0, u64::MAX, &[1; 200])).await,
        "18446744073709551615",
    );
    assert_violation(
        read(base().hole(DONE, 0, 0, u32::MAX)).await,
        "4294967295 bytes at 0",
    );
    assert_violation(read(base().hole(DONE, 0, 0, 0)).await, "0 bytes at 0");
    assert_violation(
        read(base().data(0, 0, 0, &[1; 4096]).data(DONE, 0, 0, &[2; 4096])).await,
        "sent before",
    );
    assert_violation(
        read(base().data(0, 0, 0, &[1; 4095]).chunk(DONE, 0, 0, &[])).await,
        "missing from 4095",
    );
    assert_violation(read(base().chunk(DONE, 0, 0, &[])).await, "missing from 0");
}

/// Four writes of zeroes are in flight together: one that fails fails alone, in whatever order the answers come; and
/// what does not answer a write is no answer.
#[tokio::test]
async fn answers_to_writes_of_zeroes() {
    let none = CommandFlags::empty();
    let base = || Script::structured().requests(4);
    let answers = base()
        .error(DONE, 0x8001, 2, 28, b"no room")
        .chunk(DONE, 0, 3, &[])
        .chunk(DONE, 0, 0, &[])
        .chunk(DONE, 0, 1, &[])
        .silence();
    let four = async |script: Script| {
        let client = script.serve().connect().await.unwrap();
        let zeroes = |n: u64| client.write_zeroes(n * 8192, 4096, none);
        tokio::join!(zeroes(0), zeroes(1), zeroes(2), zeroes(3))
    };
    let (a, b, c, d) = four(answers).await;
    assert!(a.is_ok() && b.is_ok() && d.is_ok());
    assert!(
        matches!(
            c,
            Err(Error::Server {
                errno: Errno::NoSpc,
                ..
            })
        ),
        "{c:?}"
    );
    let (a, b, ..) = four(base().chunk(DONE, 0, 0, &[]).data(DONE, 1, 8192, &[1; 4096])).await;
    assert!(a.is_ok());
    assert_violation(b, "Data chunk in answer to a write of zeroes");
    let (a, ..) = four(base().hole(DONE, 0, 0, 4096)).await;
    assert_violation(a, "Hole chunk in answer to a write of zeroes");
    let (a, b, c, d) = four(base().chunk(DONE, 0, 0, &[])).await;
    assert!(a.is_ok());
    for lost in [b, c, d] {
        assert_disconnected(lost, "");
    }
}

#[tokio::test]
async fn replies_cut_short() {
    let read = async |script: Script| script.serve().read().await;
    let base = || Script::structured().requests(1);
    assert_disconnected(read(base()).await, "requests unanswered");
    assert_disconnected(read(base().send([0x66, 0x8e])).await, "middle of a reply");
    assert_disconnected(
        read(base().chunk_of_length(DONE, 1, 0, 4104).send([0; 100])).await,
        "middle of a reply",
    );
    assert_disconnected(
        read(Script::simple().requests(1).simple_reply(0, 0, &[1; 4095])).await,
        "middle of a reply",
    );
}

#[tokio::test]
async fn a_scattered_reply_is_put_together() {
    let script = Script::structured()
        .requests(1)
        .data(0, 0, 3000, &[3; 1096])
        .hole(0, 0, 1000, 2000)
        .data(0, 0, 500, &[2; 500])
        .data(0, 0, 0, &[1; 500])
        .chunk(DONE, 0, 0, &[]);
    let expected = [vec![1; 500], vec![2; 500], vec![0; 2000], vec![3; 1096]].concat();
    assert_eq!(script.serve().read().await.unwrap(), expected);
}

#[tokio::test]
async fn an_old_server_is_served_all_the_same() {
    let script = Script::simple()
        .requests(1)
        .simple_reply(0, 0, &[9; 4096])
        .requests(2)
        .simple_reply(28, 1, &[])
        .requests(3)
        .simple_reply(0, 2, &[])
        .silence();
    let fake = script.serve();
    let client = fake.connect().await.unwrap();
    assert_eq!(client.read(0, 4096).await.unwrap()[..], [9; 4096]);
    assert!(!client.has_structured_replies() && !client.has_context(BASE_ALLOCATION));
    let full = client
        .write(0, vec![1; 512], CommandFlags::empty())
        .await
        .unwrap_err();
    assert!(
        matches!(
            full,
            Error::Server {
                errno: Errno::NoSpc,
                ..
            }
        ),
        "{full:?}"
    );
    client
        .write(0, vec![1; 512], CommandFlags::empty())
        .await
        .unwrap();

    // Older still: it knows no option but the export's name.
    let name = Script::greeting()
        .option(STRUCTURED, UNSUPPORTED, &[])
        .option(GO, UNSUPPORTED, &[]);
    let known = name
        .send([&SIZE.to_be_bytes()[..], &[0, 1]].concat())
        .silence()
        .serve();
    assert_eq!(known.connect().await.unwrap().size(), SIZE);
    let name = Script::greeting()
        .option(STRUCTURED, UNSUPPORTED, &[])
        .option(GO, UNSUPPORTED, &[]);
    let error = name.serve().connect().await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Refused {
                refusal: Refusal::UnknownExport,
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn errors_fail_their_request_alone() {
    let script = Script::structured()
        .requests(1)
        .data(0, 0, 0, &[1; 4096])
        .error(DONE, 0x8001, 0, 5, b"the disk is \x07on fire")
        .requests(2)
        .chunk(
            DONE,
            0x8002,
            1,
            &[&22_u32.to_be_bytes()[..], &[0, 0], &[0; 8]].concat(),
        )
        .requests(3)
        .error(DONE, 0x8fff, 2, 1, b"of a new kind")
        .requests(4)
        .hole(DONE, 3, 0, 4096)
        .silence();
    let client = script.serve().connect().await.unwrap();
    for (errno, message) in [
        (Errno::Io, Some("the disk is \\u{7}on fire")),
        (Errno::Inval, None),
        (Errno::Perm, Some("of a new kind")),
    ] {
        match client.read(0, 4096).await {
            Err(Error::Server {
                errno: got,
                message: words,
                ..
            }) => {
                assert_eq!((got, words.as_deref()), (errno, message));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(client.read(0, 4096).await.unwrap()[..], [0; 4096]);
}

#[tokio::test]
async fn a_server_that_cannot_answer_in_one_piece_after_all() {
    const OVERFLOW: u32 = 75;
    let script = Script::greeting()
        .option(STRUCTURED, ACK, &[])
        .option(CONTEXT, ACK, &[])
        .export_with(SIZE, 0b1110_1101)
        .option(GO, ACK, &[])
        .requests(1)
        .error(DONE, 0x8001, 0, OVERFLOW, b"")
        .requests(2)
        .data(0, 1, 2048, &[2; 2048])
        .data(DONE, 1, 0, &[1; 2048]);
    assert_eq!(
        script.serve().read().await.unwrap(),
        [vec![1; 2048], vec![2; 2048]].concat()
    );
}

#[tokio::test]
async fn errors_that_are_none_and_errors_without_end() {
    let read = async |script: Script| script.serve().read().await;
    let base = || Script::structured().requests(1);
    assert_violation(
        read(base().error(DONE, 0x8001, 0, 0, b"")).await,
        "error number 0",
    );
    let long = [&5_u32.to_be_bytes()[..], &[0xff, 0xff]].concat();
    assert_violation(
        read(base().chunk(DONE, 0x8001, 0, &long)).await,
        "shorter than it says",
    );
    assert_violation(
        read(base().chunk_of_length(DONE, 0x8001, 0, 1 << 30)).await,
        "1073741824 bytes",
    );
    let mut endless = base();
    for _ in 0..2000 {
        endless = endless.error(0, 0x8001, 0, 5, b"");
    }
    assert_violation(read(endless.silence()).await, "without end");
}

#[tokio::test]
async fn extents_that_cannot_be() {
    let status = async |script: Script| script.serve().status().await;
    let base = || Script::structured().requests(1);
    assert_violation(status(base().status(DONE, 0, 1, &[(0, 0)])).await, "length zero");
    assert_violation(
        status(base().status(DONE, 0, 1, &[(4096, 0), (1, 1)])).await,
        "beyond the requested range",
    );
    assert_violation(
        status(base().status(DONE, 0, 1, &[(1 << 30, 0)])).await,
        "past the end of the export",
    );
    assert_violation(
        status(base().status(DONE, 0, 2, &[(4096, 0)])).await,
        "never granted",
    );
    assert_violation(
        status(base().status(DONE, 0, 1, &[])).await,
        "BlockStatus chunk of 4 bytes",
    );
    assert_violation(
        status(base().chunk_of_length(DONE, 5, 0, u32::MAX - 3).silence()).await,
        "BlockStatus chunk",
    );
    assert_violation(
        status(base().chunk(DONE, 0, 0, &[])).await,
        "without all of the granted",
    );
    assert_violation(status(base().simple_reply(0, 0, &[])).await, "must be structured");
    let twice = base()
        .status(0, 0, 1, &[(4096, 0)])
        .status(DONE, 0, 1, &[(4096, 0)]);
    assert_violation(status(twice).await, "two block statuses");
    // More than was asked, and within the export: allowed, and cut.
    assert_eq!(status(base().status(DONE, 0, 1, &[(9000, 3)])).await.unwrap(), 1);
}

#[tokio::test]
async fn extents_in_many_short_answers() {
    let script = Script::structured()
        .requests(1)
        .status(DONE, 0, 1, &[(1000, 3)])
        .requests(2)
        .status(DONE, 1, 1, &[(1000, 3), (500, 0)])
        .requests(3)
        .status(DONE, 2, 1, &[(500_000, 0)])
        .requests(4)
        .status(DONE, 3, 1, &[(500_000, 3)]);
    let client = script.serve().connect().await.unwrap();
    let end = 2500 + 990_000;
    let mut extents = client.extents(BASE_ALLOCATION, 0..end).unwrap();
    let mut found = Vec::new();
    while let Some(extent) = extents.next().await.unwrap() {
        found.push((extent.offset, extent.length, extent.flags));
    }
    let half = 500_000;
    assert_eq!(
        found,
        [
            (0, 2000, 3),
            (2000, 500 + half, 0),
            (2500 + half, end - 2500 - half, 3)
        ]
    );
}

#[tokio::test]
async fn silence_is_not_for_ever() {
    // Short only where silence is to come: a busy machine is slow to answer too.
    let impatient = |handshake, idle| ConnectOptions {
        meta_contexts: vec![BASE_ALLOCATION.to_owned()],
        handshake_timeout: handshake,
        idle_timeout: Some(idle),
        ..ConnectOptions::default()
    };
    let (soon, late) = (Duration::from_millis(300), Duration::from_mins(2));
    for script in [
        Script::default(),
        Script::greeting(),
        Script::greeting().option(STRUCTURED, ACK, &[]),
    ] {
        let fake = script.silence().serve();
        let error = Client::connect(&fake.uri, &impatient(soon, late))
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    }
    // Half a reply and no more; and one that answers some and not the others.
    let half = Script::structured()
        .requests(1)
        .chunk_of_length(DONE, 1, 0, 4104)
        .send([0; 100]);
    let some = Script::structured().requests(2).hole(DONE, 1, 0, 4096);
    for script in [half, some] {
        let fake = script.silence().serve();
        let client = Client::connect(&fake.uri, &impatient(late, soon)).await.unwrap();
        let (first, second) = tokio::join!(client.read(0, 4096), client.read(0, 4096));
        let error = [first, second].into_iter().find_map(Result::err).unwrap();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert!(error.to_string().contains("300ms"), "{error}");
        assert!(!client.is_open());
    }
    // With nothing to answer, a server may be silent as long as it likes.
    let fake = Script::structured()
        .requests(1)
        .hole(DONE, 0, 0, 4096)
        .silence()
        .serve();
    let idle = Duration::from_secs(3);
    let client = Client::connect(&fake.uri, &impatient(late, idle)).await.unwrap();
    tokio::time::sleep(idle + Duration::from_secs(1)).await;
    client.read(0, 4096).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_is_not_answered_is_left_for_another() {
    let options = |first_answer| ConnectOptions {
        meta_contexts: vec![BASE_ALLOCATION.to_owned()],
        first_answer,
        ..ConnectOptions::default()
    };
    let mute = || Script::structured().silence();
    let answers = || Script::structured().requests(1).hole(DONE, 0, 0, 512).silence();
    let soon = Some(Duration::from_millis(300));
    // The third answers. One that had not been left would leave this one waiting for ever.
    let fake = mute().serve_then(vec![mute(), answers()]);
    let client = Client::connect(&fake.uri, &options(soon)).await.unwrap();
    assert!(client.is_open());
    // Without it nobody asks before something is wanted, and one that never answers is connected to in the end.
    let fake = mute().serve();
    assert!(
        Client::connect(&fake.uri, &options(None))
            .await
            .unwrap()
            .is_open()
    );
    assert!(
        Client::connect(&fake.uri, &options(soon))
            .await
            .unwrap()
            .is_open()
    );
}

#[tokio::test]
async fn a_server_that_says_it_stops_is_left() {
    let fake = Script::structured()
        .requests(1)
        .error(DONE, 0x8001, 0, 108, b"")
        .requests(2)
        .serve();
    let client = fake.connect().await.unwrap();
    let error = client.read(0, 4096).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Server {
                errno: Errno::Shutdown,
                ..
            }
        ),
        "{error:?}"
    );
    // For ever, where it is not left: then the runner ends the test.
    while client.is_open() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_disconnected(client.read(0, 4096).await, "");
}

/// An export of 8 EiB costs nothing until it is read, and a bulk read of it only what is in flight.
#[tokio::test]
async fn a_size_that_lies() {
    let size = u64::try_from(i64::MAX).unwrap();
    let fake = Script::structured_of(size)
        .requests(2)
        .status(DONE, 0, 1, &[(1 << 30, 3)])
        .serve();
    let client = fake.connect().await.unwrap();
    assert_eq!(client.size(), size);
    let mut reader = BulkReader::new(vec![client.clone()], 0..size, &BulkOptions::default()).unwrap();
    let error = loop {
        match reader.next().await {
            Ok(chunk) => assert!(chunk.is_some()),
            Err(error) => break error,
        }
    };
    assert_disconnected::<()>(Err(error), "unanswered");
    assert!(matches!(
        client.read(size, 1).await,
        Err(Error::OutOfBounds { .. })
    ));
}
