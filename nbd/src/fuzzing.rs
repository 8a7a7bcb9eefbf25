//! Doors for fuzz targets: the parsers, and a whole session with a server that says whatever the
//! fuzzer likes. Not part of the interface.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;

use crate::client::{Client, ConnectOptions};
use crate::copy::{BulkOptions, BulkReader};
use crate::extents::{BASE_ALLOCATION, clipped};
use crate::uri::Uri;
use crate::wire::{self, CommandFlags, Greeting, Info, Opt, OptionReply, ReplyHead, StatusChunk};

/// Feeds `data` to every parser of a message.
pub fn messages(data: &[u8]) {
    let _ = Greeting::parse(data);
    let _ = OptionReply::parse(data, Opt::Go).map(OptionReply::refusal);
    let _ = Info::parse(data);
    let _ = wire::parse_export_name_reply(data);
    let _ = wire::parse_listed_export(data);
    let _ = wire::parse_meta_context(data);
    if let Ok(ReplyHead::Chunk { chunk, .. }) = ReplyHead::parse(data) {
        let _ = chunk.check_length(1, 1);
    }
    let _ = wire::parse_hole(data);
    let _ = wire::parse_error(data);
    let _ = wire::printable(data);
    if let Ok(chunk) = StatusChunk::parse(Bytes::copy_from_slice(data), 1, 1000, 1 << 40) {
        let _ = clipped(1, chunk.descriptors(), &(1..1001));
    }
}

/// Feeds `data` to the parser of URIs. A URI that was understood must survive being written.
///
/// # Panics
/// If it does not.
pub fn uri(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(uri) = text.parse::<Uri>() {
        let written = uri.to_string();
        assert_eq!(
            written.parse::<Uri>().ok(),
            Some(uri),
            "{text:?} was written as {written:?}"
        );
    }
}

/// Runs a client against a server that sends `replies` after a good handshake, and then hangs up.
/// The export has 1 MiB and the context [`BASE_ALLOCATION`].
pub fn session(replies: &[u8]) {
    conversation(&[&handshake(1 << 20), replies].concat());
}

/// Runs a client against a server that sends `data` from its first word on, and then hangs up.
///
/// # Panics
/// If there can be no runtime.
pub fn conversation(data: &[u8]) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
    else {
        panic!("no runtime");
    };
    runtime.block_on(async {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let said = data.to_vec();
        let server = tokio::spawn(async move {
            let _ = theirs.write_all(&said).await;
            let _ = theirs.shutdown().await;
            // Whatever the client has to say.
            let mut sink = tokio::io::sink();
            let _ = tokio::io::copy(&mut theirs, &mut sink).await;
        });
        let options = ConnectOptions {
            meta_contexts: vec![BASE_ALLOCATION.to_owned()],
            handshake_timeout: Duration::from_secs(5),
            idle_timeout: Some(Duration::from_secs(5)),
            ..ConnectOptions::default()
        };
        let uri = Uri::unix("/fuzz", "x");
        let target = uri.to_string().into();
        if let Ok(client) = Client::over(Box::new(ours), &uri, target, &options).await {
            requests(client).await;
        }
        server.abort();
    });
}

async fn requests(client: Client) {
    let size = client.size();
    let length = size.min(4096);
    let read_length = usize::try_from(length).unwrap_or(0);
    let none = CommandFlags::empty();
    let _ = tokio::join!(
        client.read(0, read_length),
        client.read(0, read_length / 2),
        client.block_status(0, length, BASE_ALLOCATION),
        client.write_zeroes(0, length, none),
        client.flush(),
    );
    if let Ok(mut reader) = BulkReader::new(vec![client.clone()], 0..length, &BulkOptions::default()) {
        let mut at = 0;
        while let Ok(Some(chunk)) = reader.next().await {
            assert_eq!(chunk.offset(), at, "a gap or an overlap in a bulk read");
            at += chunk.length();
        }
    }
    client.disconnect().await;
}

/// What a good server says up to transmission.
fn handshake(size: u64) -> Vec<u8> {
    let mut said = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
    let mut reply = |option: u32, kind: u32, data: &[u8]| {
        said.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
        said.extend(option.to_be_bytes());
        said.extend(kind.to_be_bytes());
        said.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
        said.extend(data);
    };
    reply(Opt::StructuredReply as u32, wire::REP_ACK, &[]);
    let context = [&[0, 0, 0, 1], BASE_ALLOCATION.as_bytes()].concat();
    reply(Opt::SetMetaContext as u32, wire::REP_META_CONTEXT, &context);
    reply(Opt::SetMetaContext as u32, wire::REP_ACK, &[]);
    let flags = 0x6d_u16.to_be_bytes();
    reply(
        Opt::Go as u32,
        wire::REP_INFO,
        &[&[0, 0], &size.to_be_bytes()[..], &flags[..]].concat(),
    );
    reply(Opt::Go as u32, wire::REP_ACK, &[]);
    said
}
