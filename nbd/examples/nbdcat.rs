//! Reads a whole export to a file, or to nowhere, for measuring: what `nbdcopy URI FILE` does.
//!
//! `cargo run --release -p disksnap-nbd --example nbdcat -- URI [FILE] [--connections N] [--request N]
//! [--in-flight N] [--window N] [--changed CONTEXT] [--everything]`; without FILE the bytes are dropped.

#![allow(clippy::print_stdout, reason = "a program talks on standard output")]

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use disksnap_nbd::{BASE_ALLOCATION, BulkOptions, BulkReader, Chunk, Client, ConnectOptions, Uri};

struct Arguments {
    uri: Uri,
    file: Option<String>,
    connections: usize,
    bulk: BulkOptions,
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let uri = arguments.next().ok_or("usage: nbdcat URI [FILE]")?.parse()?;
    let mut parsed = Arguments {
        uri,
        file: None,
        connections: 1,
        bulk: BulkOptions::default(),
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--connections" => parsed.connections = value()?.parse()?,
            "--request" => parsed.bulk.request_size = value()?.parse()?,
            "--in-flight" => parsed.bulk.in_flight = value()?.parse()?,
            "--window" => parsed.bulk.in_flight_bytes = value()?.parse()?,
            "--changed" => parsed.bulk.only_changed = Some(value()?),
            "--everything" => parsed.bulk.skip_zeroes = false,
            _ => parsed.file = Some(argument),
        }
    }
    Ok(parsed)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let Arguments {
        uri,
        file,
        connections,
        bulk,
    } = arguments()?;
    let mut meta_contexts = vec![BASE_ALLOCATION.to_owned()];
    meta_contexts.extend(bulk.only_changed.clone());
    let options = ConnectOptions {
        meta_contexts,
        ..ConnectOptions::default()
    };

    let start = Instant::now();
    let clients = Client::connect_many(&uri, &options, connections).await?;
    let (size, connections) = (clients[0].size(), clients.len());
    let file = file.map(File::create).transpose()?;
    if let Some(file) = &file {
        file.set_len(size)?;
    }
    let (mut data_bytes, mut zero_bytes) = (0, 0);
    let mut reader = BulkReader::new(clients, 0..size, &bulk)?;
    while let Some(chunk) = reader.next().await? {
        match chunk {
            Chunk::Data { offset, data } => {
                data_bytes += data.len() as u64;
                if let Some(file) = &file {
                    file.write_all_at(&data, offset)?;
                }
            }
            // The file was made new: what is not written is zero.
            Chunk::Zero { length, .. } => zero_bytes += length,
        }
    }
    let took = start.elapsed().as_secs_f64();
    println!("{data_bytes} bytes of data, {zero_bytes} of zeroes, {connections} connections, {took:.3} s");
    Ok(())
}
