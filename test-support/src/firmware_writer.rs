//! A guest of 205 bytes: the boot sector of a disk, which the machine's firmware starts, and which writes to the other
//! disks for ever. It runs where a Linux would take minutes to boot.
//!
//! Each round writes one sector full of the round's number (32 bits, little endian) at a scattered place to each disk in
//! turn, then such a sector at place 0 to each disk in turn; every eighth round it prints `WRITER n` on the serial port.
//! The firmware waits for each write to end.

use std::fs;
use std::path::{Path, PathBuf};

use crate::pattern::MIB;

/// The size of each write, in bytes.
const SECTOR: u64 = 512;

/// Where the number of places to write to, less one, stands in the program.
const RANGE: usize = 0x2a;
/// Where the firmware's number of the last disk stands in it. That of the first is 0x81, after the boot disk.
const LAST: usize = 0x80;
const BEFORE_FIRST: usize = 0x80;

/// What `as --32` makes of the comments in `.code16`, to be loaded at 0x7c00.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x31, 0xc0,                               // xor %ax,%ax
    0x8e, 0xd8,                               // mov %ax,%ds
    0x8e, 0xc0,                               // mov %ax,%es
    0x8e, 0xd0,                               // mov %ax,%ss
    0xbc, 0x00, 0x7c,                         // mov $0x7c00,%sp
    0xfc,                                     // cld
    0x66, 0x31, 0xed,                         // xor %ebp,%ebp
    // round:
    0x66, 0x45,                               // inc %ebp
    0x66, 0x89, 0xe8,                         // mov %ebp,%eax
    0xbf, 0x00, 0x80,                         // mov $0x8000,%di
    0xb9, 0x80, 0x00,                         // mov $0x80,%cx
    0x66, 0xf3, 0xab,                         // rep stos %eax,%es:(%di)
    0x66, 0x69, 0xc5, 0xb1, 0x79, 0x37, 0x9e, // imul $0x9e3779b1,%ebp,%eax
    0x66, 0xc1, 0xe8, 0x03,                   // shr $0x3,%eax
    // range:
    0x66, 0x25, 0xff, 0xff, 0xff, 0x00,       // and $0xffffff,%eax
    0x66, 0x40,                               // inc %eax
    0xe8, 0x39, 0x00,                         // call write
    0x66, 0x31, 0xc0,                         // xor %eax,%eax
    0xe8, 0x33, 0x00,                         // call write
    0xf7, 0xc5, 0x07, 0x00,                   // test $0x7,%bp
    0x75, 0xd0,                               // jne round
    0xbe, 0xa7, 0x7c,                         // mov $progress,%si
    0xe8, 0x48, 0x00,                         // call say
    0x66, 0x89, 0xe8,                         // mov %ebp,%eax
    0x66, 0xbb, 0x0a, 0x00, 0x00, 0x00,       // mov $0xa,%ebx
    0x31, 0xc9,                               // xor %cx,%cx
    // digit:
    0x66, 0x31, 0xd2,                         // xor %edx,%edx
    0x66, 0xf7, 0xf3,                         // div %ebx
    0x52,                                     // push %dx
    0x41,                                     // inc %cx
    0x66, 0x85, 0xc0,                         // test %eax,%eax
    0x75, 0xf3,                               // jne digit
    // shown:
    0x58,                                     // pop %ax
    0x04, 0x30,                               // add $0x30,%al
    0xe8, 0x34, 0x00,                         // call print
    0xe2, 0xf8,                               // loop shown
    0xb0, 0x0a,                               // mov $0xa,%al
    0xe8, 0x2d, 0x00,                         // call print
    0xeb, 0xa3,                               // jmp round
    // write:
    0x66, 0xa3, 0xc5, 0x7c,                   // mov %eax,place
    0xb2, 0x81,                               // mov $0x81,%dl
    // each:
    0xbe, 0xbd, 0x7c,                         // mov $packet,%si
    0xb8, 0x00, 0x43,                         // mov $0x4300,%ax
    0xcd, 0x13,                               // int $0x13
    0x72, 0x08,                               // jb failed
    0xfe, 0xc2,                               // inc %dl
    // last:
    0x80, 0xfa, 0x81,                         // cmp $0x81,%dl
    0x76, 0xef,                               // jbe each
    0xc3,                                     // ret
    // failed:
    0xbe, 0xaf, 0x7c,                         // mov $failure,%si
    0xe8, 0x03, 0x00,                         // call say
    // stand:
    0xf4,                                     // hlt
    0xeb, 0xfd,                               // jmp stand
    // say:
    0xac,                                     // lods %ds:(%si),%al
    0x84, 0xc0,                               // test %al,%al
    0x74, 0x14,                               // je said
    0xe8, 0x02, 0x00,                         // call print
    0xeb, 0xf6,                               // jmp say
    // print:
    0x88, 0xc4,                               // mov %al,%ah
    0xba, 0xfd, 0x03,                         // mov $0x3fd,%dx
    // ready:
    0xec,                                     // in (%dx),%al
    0xa8, 0x20,                               // test $0x20,%al
    0x74, 0xfb,                               // je ready
    0x88, 0xe0,                               // mov %ah,%al
    0xb2, 0xf8,                               // mov $0xf8,%dl
    0xee,                                     // out %al,(%dx)
    // said:
    0xc3,                                     // ret
    // progress: "WRITER "
    0x57, 0x52, 0x49, 0x54, 0x45, 0x52, 0x20, 0x00,
    // failure: "GUEST FAILED\n"
    0x47, 0x55, 0x45, 0x53, 0x54, 0x20, 0x46, 0x41, 0x49, 0x4c, 0x45, 0x44, 0x0a, 0x00,
    // packet: of 16 bytes, one sector, from 0:0x8000; then the place, 64 bits
    0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00,
    // place:
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// Makes the disk to boot from. The others are of `size` bytes each.
pub(crate) fn make_boot_disk(dir: &Path, disks: usize, size: u64) -> PathBuf {
    let mut sector = PROGRAM.to_vec();
    sector[RANGE..RANGE + 4].copy_from_slice(&(places(size) - 1).to_le_bytes());
    sector[LAST] = u8::try_from(BEFORE_FIRST + disks).expect("the firmware numbers 127 disks");
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    // The firmware does not boot from a disk of one sector.
    sector.resize(usize::try_from(MIB).expect("a MiB fits"), 0);
    let path = dir.join("boot.raw");
    fs::write(&path, sector).expect("a file can be written in a temporary directory");
    path
}

/// How many places, after place 0, it writes to on disks of this size: a power of two.
fn places(size: u64) -> u32 {
    let most = u32::try_from(size / SECTOR - 1).expect("a disk for tests is small");
    assert!(most > 0, "a disk of {size} bytes has no room for the writer");
    1 << most.ilog2()
}

/// Where a round writes.
fn place(round: u32, places: u32) -> usize {
    let scattered = round.wrapping_mul(0x9e37_79b1) >> 3;
    1 + usize::try_from(scattered & (places - 1)).expect("a usize has 32 bits")
}

/// The round that the writer was in, from the bytes of a whole disk that held only zeroes when it began.
///
/// # Errors
/// What is not as it was at any one instant: every sector is looked at.
pub fn firmware_writer_round(disk: &[u8]) -> Result<u32, String> {
    let found = numbers(disk)?;
    as_after(vec![0; found.len()], &found, found[0])
}

/// The same of a writer that was started on a disk that held what an earlier one, or several, had left: `before`. Round 0 is
/// its boot, in which it has not written its first number yet: where it has come as far as the one before, that cannot be told from it,
/// and both are given.
///
/// # Errors
/// As of [`firmware_writer_round`].
pub fn firmware_writer_round_over(before: &[u8], disk: &[u8]) -> Result<Vec<u32>, String> {
    let (before, found) = (numbers(before)?, numbers(disk)?);
    let boot = as_after(before.clone(), &found, 0);
    match (boot, as_after(before, &found, found[0])) {
        (Ok(0), Ok(round)) if round > 0 => Ok(vec![0, round]),
        (Ok(round), _) | (_, Ok(round)) => Ok(vec![round]),
        (_, Err(why)) => Err(why),
    }
}

fn numbers(disk: &[u8]) -> Result<Vec<u32>, String> {
    let sectors = disk
        .chunks(usize::try_from(SECTOR).expect("a sector fits"))
        .enumerate();
    sectors
        .map(|(at, sector)| number(sector).ok_or_else(|| format!("sector {at} is torn")))
        .collect()
}

/// Whether what was found is what these sectors were after so many rounds, or in the midst of the next one.
fn as_after(mut expected: Vec<u32>, found: &[u32], round: u32) -> Result<u32, String> {
    let places = places(expected.len() as u64 * SECTOR);
    if round > 0 {
        expected[0] = round;
    }
    for earlier in 1..=round {
        expected[place(earlier, places)] = earlier;
    }
    let next = place(round + 1, places);
    let wrong = |at: &usize| found[*at] != expected[*at] && (*at, found[*at]) != (next, round + 1);
    match (0..found.len()).find(wrong) {
        None => Ok(round),
        Some(at) => Err(format!(
            "sector {at} is of round {}, but in round {round} it was of round {}",
            found[at], expected[at]
        )),
    }
}

/// What a sector is full of.
fn number(sector: &[u8]) -> Option<u32> {
    let first: [u8; 4] = sector.get(..4)?.try_into().ok()?;
    // It is full of what it begins with where it is the same four bytes on.
    let full = sector[4..] == sector[..sector.len() - 4];
    full.then(|| u32::from_le_bytes(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk as the writer leaves it within a round: with its block, or with its header too.
    fn after(round: u32, header: bool, sectors: usize) -> Vec<u8> {
        let mut disk = vec![0; sectors * 512];
        let places = places(disk.len() as u64);
        for n in 1..=round {
            let mut write = |at: usize| {
                for word in disk[at * 512..][..512].chunks_mut(4) {
                    word.copy_from_slice(&n.to_le_bytes());
                }
            };
            write(place(n, places));
            if n < round || header {
                write(0);
            }
        }
        disk
    }

    #[test]
    fn a_writer_that_was_started_again_is_told_from_the_one_before() {
        let before = after(60, false, 100);
        let mut disk = before.clone();
        assert_eq!(firmware_writer_round_over(&before, &disk), Ok(vec![0, 59]));
        let mut write = |at: usize, n: u32| {
            for word in disk[at * 512..][..512].chunks_mut(4) {
                word.copy_from_slice(&n.to_le_bytes());
            }
        };
        write(place(1, places(51200)), 1);
        write(0, 1);
        write(place(2, places(51200)), 2);
        assert_eq!(firmware_writer_round_over(&before, &disk), Ok(vec![1]));
        firmware_writer_round(&disk).expect_err("it is over something");
        let lost = place(60, places(51200)) * 512;
        disk[lost..lost + 512].fill(0);
        firmware_writer_round_over(&before, &disk).expect_err("what was there before is lost");
    }

    #[test]
    fn an_instant_is_told_from_what_is_none() {
        for round in [1, 2, 60, 300] {
            assert_eq!(firmware_writer_round(&after(round, true, 100)), Ok(round));
            assert_eq!(firmware_writer_round(&after(round, false, 100)), Ok(round - 1));
        }
        let mut lost = after(60, true, 100);
        let at = place(60, places(51200)) * 512;
        lost[at..at + 512].fill(0);
        let why = firmware_writer_round(&lost).expect_err("a write is lost");
        assert!(why.contains("in round 60"), "{why}");
        lost[at] = 60;
        let why = firmware_writer_round(&lost).expect_err("half a write");
        assert!(why.contains("torn"), "{why}");
    }
}
