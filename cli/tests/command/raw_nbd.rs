//! A client that speaks just enough of NBD, one request after another or many with no answer read: what other programs do
//! to a server, and ours do not.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// Fixed newstyle, and no zeroes after the export's size.
const FLAGS: u32 = 3;
const EXPORT_NAME: u32 = 1;

/// A server that is silent for so long fails the test, which would otherwise hang.
const SILENCE: Option<Duration> = Some(Duration::from_mins(3));

/// What a connection goes over.
trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

/// A connection to an export.
pub(crate) struct RawNbd {
    stream: Box<dyn Stream>,
}

impl RawNbd {
    /// Connects to what a URI (`nbd+unix:///NAME?socket=PATH`, `nbd://HOST:PORT/NAME`) names.
    pub(crate) fn of(uri: &str) -> Self {
        assert!(!uri.contains('%'), "{uri} is escaped");
        let unix = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="));
        let tcp = uri.strip_prefix("nbd://").and_then(|rest| rest.split_once('/'));
        let (name, mut stream): (&str, Box<dyn Stream>) = match (unix, tcp) {
            (Some((name, socket)), _) => {
                let stream = UnixStream::connect(socket).unwrap();
                stream.set_read_timeout(SILENCE).unwrap();
                (name, Box::new(stream))
            }
            (None, Some((place, name))) => {
                let stream = TcpStream::connect(place).unwrap();
                stream.set_read_timeout(SILENCE).unwrap();
                (name, Box::new(stream))
            }
            (None, None) => panic!("{uri} names no place"),
        };
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut hello = FLAGS.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(EXPORT_NAME.to_be_bytes());
        hello.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        hello.extend(name.as_bytes());
        stream.write_all(&hello).unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).unwrap();
        assert_ne!(export[..8], [0; 8], "an empty export");
        Self { stream }
    }

    /// Asks for bytes, and does not wait for them.
    pub(crate) fn ask(&mut self, offset: u64, length: u32) -> io::Result<()> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        // No flags, a read, and the offset as what the answer is known by.
        request.extend([0; 4]);
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        self.stream.write_all(&request)
    }

    /// Reads bytes; a server's error, or its going, is an error.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.ask(offset, length)?;
        let (of, bytes) = self.receive(length)?;
        assert_eq!(of, offset);
        Ok(bytes)
    }

    /// The next answer, and the offset that it is for.
    pub(crate) fn receive(&mut self, length: u32) -> io::Result<(u64, Vec<u8>)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        let offset = u64::from_be_bytes(reply[8..].try_into().unwrap());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap()));
        }
        let mut bytes = vec![0; length as usize];
        self.stream.read_exact(&mut bytes)?;
        Ok((offset, bytes))
    }
}
