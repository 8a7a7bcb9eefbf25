//! Doors for fuzz targets: the parsers, and a whole session with a server that says whatever the
//! fuzzer likes. Not part of the interface.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::client::Client;
use crate::connect::ConnectOptions;
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

/// Runs a client against a server that makes a good handshake, sends `replies` once it has been asked
/// something, and then hangs up. The export has 1 MiB and the context [`BASE_ALLOCATION`].
///
/// In flight are, as cookies 0 to 4: reads of 4096 and of 2048 bytes, the status of 4096 bytes, a
/// write of 4096 zeroes, all at 0, and a flush.
pub fn session(replies: &[u8]) {
    run(handshake(1 << 20), replies.to_vec());
}

/// Runs a client against a server that sends `data` from its first word on, and then hangs up.
pub fn conversation(data: &[u8]) {
    run(data.to_vec(), Vec::new());
}

fn run(first: Vec<u8>, when_asked: Vec<u8>) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
    else {
        panic!("no runtime");
    };
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let server = tokio::spawn(serve(theirs, first, when_asked));
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

async fn serve(mut stream: DuplexStream, first: Vec<u8>, when_asked: Vec<u8>) {
    let _ = stream.write_all(&first).await;
    if !when_asked.is_empty() {
        let mut heard = Vec::new();
        while !heard
            .windows(4)
            .any(|window| window == wire::REQUEST_MAGIC.to_be_bytes())
        {
            if stream.read_buf(&mut heard).await.unwrap_or(0) == 0 {
                return;
            }
        }
        let _ = stream.write_all(&when_asked).await;
    }
    let _ = stream.shutdown().await;
    // Whatever else the client has to say.
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A structured reply that is right in parts, so that it comes past the first checks.
    fn chunk() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop_oneof![Just(0_u16), Just(1), Just(2), Just(5), Just(0x8001), Just(0x8002)];
        let number = prop_oneof![
            Just(0_u32),
            Just(1),
            Just(512),
            Just(2048),
            Just(4096),
            any::<u32>()
        ];
        let numbers = proptest::collection::vec(number, 0..6);
        let data = prop_oneof![Just(0_usize), Just(1), Just(2048), Just(4096)];
        (any::<bool>(), kind, 0..5_u64, numbers, data, 0..20_u32).prop_map(
            |(done, kind, cookie, numbers, data, lie)| {
                let mut payload: Vec<u8> = numbers.into_iter().flat_map(u32::to_be_bytes).collect();
                payload.resize(payload.len() + data, 7);
                let length = u32::try_from(payload.len()).unwrap_or(0) + u32::from(lie == 0);
                let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
                bytes.extend(u16::from(done).to_be_bytes());
                bytes.extend(kind.to_be_bytes());
                bytes.extend(cookie.to_be_bytes());
                bytes.extend(length.to_be_bytes());
                bytes.extend(payload);
                bytes
            },
        )
    }

    proptest! {
        #[test]
        fn no_reply_makes_a_session_panic_or_hang(chunks in proptest::collection::vec(chunk(), 1..12)) {
            session(&chunks.concat());
        }

        #[test]
        fn no_first_words_do(bytes in proptest::collection::vec(any::<u8>(), 0..100), cut in 0..400_usize) {
            conversation(&bytes);
            let good = handshake(1 << 20);
            let kept = &good[..cut.min(good.len())];
            conversation(&[kept, &bytes].concat());
        }
    }
}
