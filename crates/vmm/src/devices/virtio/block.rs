//! Block device (virtio 1.2, section 5.2) over a raw file.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Reader, Writer};
use vmm_sys_util::write_zeroes::{PunchHole, WriteZeroesAt};

use super::mmio::QUEUE_SIZE;
use super::{Chain, QueueError, VirtioDevice};
use crate::memory::GuestMemory;

/// Unit of all addresses and sizes of the protocol.
pub const SECTOR: u64 = 512;
/// Bytes copied at a time between file and guest.
const CHUNK: usize = 128 << 10;
/// Length of the identification string.
const ID_LENGTH: usize = 20;
/// Sectors of one discard or write-zeroes range, at most.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Ranges of one discard or write-zeroes request, at most.
const MAX_RANGES: u32 = 16;
/// Write zeroes: the sectors may be unmapped.
const FLAG_UNMAP: u32 = 1;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Cannot be opened.
    #[error("cannot open the disk {}: {error}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// In use.
    #[error("the disk {} is locked by another process (give `,ro` to read one file from several machines)", .0.display())]
    Locked(PathBuf),
    /// A directory, a pipe …
    #[error("the disk {} is {what}; a raw disk image or a block device is needed", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Empty, or with a partial sector at its end.
    #[error("the disk {} has {length} bytes; a multiple of {SECTOR}, and not 0, is needed", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
}

/// A raw disk image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_LENGTH],
}

impl Disk {
    /// Opens and locks a file or block device.
    pub fn open(path: &Path, read_only: bool) -> Result<Disk, DiskError> {
        let fail = |error| DiskError::Open { path: path.into(), error };
        let mut file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(fail)?;
        let kind = file.metadata().map_err(fail)?.file_type();
        if kind.is_dir() {
            return Err(DiskError::Kind { path: path.into(), what: "a directory" });
        }
        let locked = if read_only { file.try_lock_shared() } else { file.try_lock() };
        match locked {
            Err(TryLockError::WouldBlock) => return Err(DiskError::Locked(path.into())),
            Err(TryLockError::Error(error)) => return Err(fail(error)),
            Ok(()) => {}
        }
        let length = file.seek(SeekFrom::End(0)).map_err(fail)?;
        if length == 0 || !length.is_multiple_of(SECTOR) {
            return Err(DiskError::Length { path: path.into(), length });
        }
        let mut id = [0; ID_LENGTH];
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        let length_of_id = name.len().min(ID_LENGTH);
        id[..length_of_id].copy_from_slice(&name[..length_of_id]);
        Ok(Disk { file, sectors: length / SECTOR, read_only, id })
    }

    /// The byte offset of a range of `length` bytes from `sector` on, if it lies on the disk.
    fn range(&self, sector: u64, length: u64) -> Option<u64> {
        let end = sector.checked_add(length.div_ceil(SECTOR))?;
        (length.is_multiple_of(SECTOR) && end <= self.sectors).then_some(sector * SECTOR)
    }
}

/// The header of every request.
struct Request {
    kind: u32,
    sector: u64,
}

/// The device.
pub struct Block {
    disk: Disk,
    config: [u8; 60],
    buffer: Vec<u8>,
}

/// A request that fails with a status.
struct Failure(u32);

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Failure(VIRTIO_BLK_S_UNSUPP),
            _ => {
                tracing::warn!("disk: {error}");
                Failure(VIRTIO_BLK_S_IOERR)
            }
        }
    }
}

impl Block {
    /// A device for `disk`.
    pub fn new(disk: Disk) -> Self {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &disk.sectors.to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes()); // seg_max: all but header and status
        put(20, &(SECTOR as u32).to_le_bytes()); // blk_size
        put(36, &MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
        put(44, &1_u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        Self { disk, config, buffer: Vec::new() }
    }

    /// Executes a request; gives the number of data bytes written to the guest.
    fn execute(
        &mut self,
        request: &Request,
        input: &mut Reader<'_>,
        output: &mut Writer<'_>,
    ) -> Result<usize, Failure> {
        if request.kind == VIRTIO_BLK_T_IN {
            return self.read(request.sector, output);
        }
        match request.kind {
            VIRTIO_BLK_T_FLUSH => self.disk.file.sync_data()?,
            VIRTIO_BLK_T_GET_ID => {
                let length = output.available_bytes().min(ID_LENGTH);
                output.write_all(&self.disk.id[..length])?;
                return Ok(length);
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.disk.read_only => {
                return Err(Failure(VIRTIO_BLK_S_IOERR));
            }
            VIRTIO_BLK_T_OUT => self.write(request.sector, input)?,
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.erase(request.kind, input)?,
            _ => return Err(Failure(VIRTIO_BLK_S_UNSUPP)),
        }
        Ok(0)
    }

    fn read(&mut self, sector: u64, output: &mut Writer<'_>) -> Result<usize, Failure> {
        let length = output.available_bytes();
        let mut offset = self.disk.range(sector, length as u64).ok_or(Failure(VIRTIO_BLK_S_IOERR))?;
        let mut left = length;
        self.buffer.resize(CHUNK, 0);
        while left != 0 {
            let chunk = &mut self.buffer[..left.min(CHUNK)];
            self.disk.file.read_exact_at(chunk, offset)?;
            output.write_all(chunk)?;
            offset += chunk.len() as u64;
            left -= chunk.len();
        }
        Ok(length)
    }

    fn write(&mut self, sector: u64, input: &mut Reader<'_>) -> Result<(), Failure> {
        let mut left = input.available_bytes();
        let mut offset = self.disk.range(sector, left as u64).ok_or(Failure(VIRTIO_BLK_S_IOERR))?;
        self.buffer.resize(CHUNK, 0);
        while left != 0 {
            let chunk = &mut self.buffer[..left.min(CHUNK)];
            input.read_exact(chunk)?;
            self.disk.file.write_all_at(chunk, offset)?;
            offset += chunk.len() as u64;
            left -= chunk.len();
        }
        Ok(())
    }

    /// Discards ranges or fills them with zeroes; each is a sector, a count and flags.
    fn erase(&mut self, kind: u32, input: &mut Reader<'_>) -> Result<(), Failure> {
        const RANGE: usize = 16;
        let count = input.available_bytes() / RANGE;
        if !input.available_bytes().is_multiple_of(RANGE) || count > MAX_RANGES as usize {
            return Err(Failure(VIRTIO_BLK_S_IOERR));
        }
        for _ in 0..count {
            let (sector, sectors, flags) =
                (input.read_obj::<u64>()?, input.read_obj::<u32>()?, input.read_obj::<u32>()?);
            let discard = kind == VIRTIO_BLK_T_DISCARD;
            let known = if discard { 0 } else { FLAG_UNMAP };
            if flags & !known != 0 {
                return Err(Failure(VIRTIO_BLK_S_UNSUPP));
            }
            let length = u64::from(sectors) * SECTOR;
            let offset = self.disk.range(sector, length);
            let (Some(offset), true) = (offset, sectors <= MAX_RANGE_SECTORS) else {
                return Err(Failure(VIRTIO_BLK_S_IOERR));
            };
            if sectors == 0 {
                continue;
            }
            if discard || flags & FLAG_UNMAP != 0 {
                self.disk.file.punch_hole(offset, length)?;
            } else {
                self.disk.file.write_all_zeroes_at(offset, length as usize)?;
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        always
            | if self.disk.read_only {
                1 << VIRTIO_BLK_F_RO
            } else {
                1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            }
    }

    fn queues(&self) -> usize {
        1
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn handle(&mut self, _queue: usize, memory: &GuestMemory, chain: Chain<'_>) -> Result<u32, QueueError> {
        let mut input = chain.clone().reader(memory)?;
        let mut output = chain.writer(memory)?;
        let mut header = [0; 16];
        input.read_exact(&mut header).map_err(|_| QueueError::Malformed("no request header"))?;
        let [kind, _, sector_low, sector_high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])));
        let request = Request { kind, sector: u64::from(sector_low) | u64::from(sector_high) << 32 };
        // The last byte that the device may write is the status.
        let data_length =
            output.available_bytes().checked_sub(1).ok_or(QueueError::Malformed("no room for the status"))?;
        let mut status_output = output.split_at(data_length)?;
        let (status, written) = match self.execute(&request, &mut input, &mut output) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure(status)) => (status, 0),
        };
        status_output.write_all(&[status as u8])?;
        Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::mmio::tests::{Bench, descriptor};
    use vmm_sys_util::tempfile::TempFile;

    const HEADER: u64 = 0x20_0000;
    const DATA: u64 = 0x21_0000;
    const STATUS: u64 = 0x22_0000;
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    fn disk(sectors: u64, read_only: bool) -> (TempFile, Bench) {
        let file = TempFile::new().unwrap();
        let bytes: Vec<u8> = (0..sectors * SECTOR).map(|i| (i / SECTOR) as u8).collect();
        file.as_file().write_all_at(&bytes, 0).unwrap();
        let mut bench = Bench::new(Box::new(Block::new(Disk::open(file.as_path(), read_only).unwrap())));
        bench.start(0);
        (file, bench)
    }

    fn header(bench: &Bench, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&sector.to_le_bytes());
        bench.fill(HEADER, &bytes);
        bench.fill(STATUS, &[0xee]);
    }

    /// Makes a request with one data descriptor and gives its status.
    fn request(bench: &mut Bench, kind: u32, sector: u64, length: u32) -> u8 {
        header(bench, kind, sector);
        let to_guest = matches!(kind, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID);
        bench.submit(
            0,
            &[
                descriptor(HEADER, 16, NEXT, 1),
                descriptor(DATA, length, NEXT | if to_guest { WRITE } else { 0 }, 2),
                descriptor(STATUS, 1, WRITE, 0),
            ],
        );
        bench.bytes(STATUS, 1)[0]
    }

    #[test]
    fn sectors_are_read_and_written() {
        let (file, mut bench) = disk(64, false);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 3, 1024), 0);
        assert_eq!(bench.bytes(DATA, 1024), [[3; 512], [4; 512]].concat());
        bench.fill(DATA, &[0xab; 512]);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, 63, 512), 0);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_FLUSH, 0, 0), 0);
        let mut bytes = [0; 512];
        file.as_file().read_exact_at(&mut bytes, 63 * SECTOR).unwrap();
        assert_eq!(bytes, [0xab; 512]);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_GET_ID, 0, 20), 0);
        let name = file.as_path().file_name().unwrap().as_encoded_bytes();
        assert!(bench.bytes(DATA, 20).starts_with(&name[..name.len().min(20)]));
        assert_eq!(bench.used_index(), 4);
    }

    #[test]
    fn what_lies_outside_fails_without_effect() {
        let (file, mut bench) = disk(8, false);
        bench.fill(DATA, &[0xab; 8192]);
        for (kind, sector, length, status) in [
            (VIRTIO_BLK_T_IN, 8, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, 7, 1024, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, 0, 511, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, u64::MAX, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, u64::MAX / 512, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, 1, 8 * 512, VIRTIO_BLK_S_IOERR),
            (99, 0, 512, VIRTIO_BLK_S_UNSUPP),
        ] {
            assert_eq!(request(&mut bench, kind, sector, length), status as u8, "{kind} {sector} {length}");
        }
        let mut bytes = [0; 4096];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i / 512));
    }

    #[test]
    fn ranges_are_discarded_and_zeroed() {
        let (file, mut bench) = disk(64, false);
        let range = |bench: &mut Bench, kind, sector: u64, sectors: u32, flags: u32| {
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend_from_slice(&sectors.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bench.fill(DATA, &bytes);
            request(bench, kind, 0, 16)
        };
        let sector = |number: u64| {
            let mut bytes = [0; 512];
            file.as_file().read_exact_at(&mut bytes, number * SECTOR).unwrap();
            bytes
        };
        assert_eq!(range(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), 0);
        assert_eq!((sector(7), sector(8), sector(15), sector(16)), ([7; 512], [0; 512], [0; 512], [16; 512]));
        for (kind, first, count, flags, status) in [
            (VIRTIO_BLK_T_WRITE_ZEROES, 63, 2, 0, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_WRITE_ZEROES, u64::MAX, 2, 0, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, u32::MAX, 0, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2, VIRTIO_BLK_S_UNSUPP),
            (VIRTIO_BLK_T_DISCARD, 0, 1, 1, VIRTIO_BLK_S_UNSUPP),
            (VIRTIO_BLK_T_DISCARD, 64, 1, 0, VIRTIO_BLK_S_IOERR),
        ] {
            assert_eq!(range(&mut bench, kind, first, count, flags), status as u8, "{kind} {first} {count}");
        }
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_DISCARD, 0, 15), VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(sector(63), [63; 512]);
    }

    #[test]
    fn a_read_only_disk_stays_as_it_is() {
        let (_file, mut bench) = disk(8, true);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 0, 512), 0);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), VIRTIO_BLK_S_IOERR as u8);
    }

    #[test]
    fn malicious_descriptors_stop_the_device_at_most() {
        let beyond = u64::MAX - 100;
        let table: [&[(u64, u32, u16, u16)]; 9] = [
            &[(HEADER, 16, 0, 0)],
            &[(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)],
            &[(beyond, 16, NEXT, 1), (STATUS, 1, WRITE, 0)],
            &[(HEADER, 16, NEXT, 1), (beyond, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)],
            &[(HEADER, 16, NEXT, 1), (0xd000_0000, 1, WRITE, 0)],
            &[(HEADER, 16, NEXT, 1), (DATA, u32::MAX, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)],
            &[(HEADER, 16, NEXT, 0)],
            &[(HEADER, 16, NEXT, 15_000)],
            &[(HEADER, 16, 4, 0)],
        ];
        let (file, mut bench) = disk(8, false);
        for (number, descriptors) in table.iter().enumerate() {
            for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
                bench.start(0);
                header(&bench, kind, 0);
                let raw: Vec<_> = descriptors.iter().map(|d| descriptor(d.0, d.1, d.2, d.3)).collect();
                bench.submit(0, &raw);
                assert!(bench.needs_reset() || bench.bytes(STATUS, 1)[0] != 0, "case {number}, kind {kind}");
            }
        }
        bench.start(0);
        assert_eq!(request(&mut bench, VIRTIO_BLK_T_IN, 0, 512), 0);
        assert_eq!(file.as_file().metadata().unwrap().len(), 4096);
    }

    #[test]
    fn what_cannot_be_a_disk_is_named() {
        let text = |result: Result<Disk, DiskError>| result.unwrap_err().to_string();
        assert!(text(Disk::open(Path::new("/nonexistent/disk"), true)).contains("/nonexistent/disk"));
        assert!(text(Disk::open(Path::new("/"), true)).contains("directory"));
        let file = TempFile::new().unwrap();
        assert!(text(Disk::open(file.as_path(), false)).contains("0 bytes"));
        file.as_file().set_len(1000).unwrap();
        assert!(text(Disk::open(file.as_path(), false)).contains("1000 bytes"));
        file.as_file().set_len(1024).unwrap();
        let first = Disk::open(file.as_path(), false).unwrap();
        assert!(text(Disk::open(file.as_path(), true)).contains("locked"));
        drop(first);
        let _readers = [true, true].map(|ro| Disk::open(file.as_path(), ro).unwrap());
    }
}
