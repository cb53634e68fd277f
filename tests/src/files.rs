//! What lies in the files of a folder, byte by byte, also while a gateway writes to them.
//!
//! Knows files, and the key by which the rows of a device are known. Must not know what is sealed, or when it should be gone.

use std::{collections::BTreeSet, fs, io, path::Path};

use waypost_gateway::store::record;
use waypost_proto::device::DeviceRecord;

use crate::Device;

/// The bytes of all files in a folder and in its folders. A file that goes while it is looked at holds nothing; what is
/// given another name meanwhile may be missed, so that nothing is there is sure only of a folder that nobody writes to.
pub fn all_bytes(folder: &Path) -> Vec<u8> {
    bytes_of(folder, &|_| true)
}

/// Whether bytes have a part.
pub fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// The parts of what is written in a row that tell it, and are nowhere by chance.
pub fn telling_parts(written: &[u8]) -> Vec<Vec<u8>> {
    let parts = written.windows(8);
    let telling = parts.filter(|part| BTreeSet::from_iter(*part).len() == 8);
    telling.map(<[u8]>::to_vec).collect()
}

/// When a device was heard, as it is written in its record.
pub fn written_times(record: &DeviceRecord) -> [Vec<u8>; 2] {
    let mut written = Vec::new();
    record::encode_device(record, &mut written);
    [record.clocks.last_contact_ms, record.clocks.last_sample_ms].map(|time_ms| {
        let mut time = Vec::new();
        prost::encoding::encode_varint(time_ms, &mut time);
        assert!(has(&written, &time), "the control of the search");
        time
    })
}

/// Whether any file in a folder holds rows of a device, known by their keys. The manifest does not: until the next start
/// it names the first and last keys of tables that are gone, which is the user's id again and no value.
pub fn has_rows_of(folder: &Path, device: &Device) -> bool {
    let key = [&device.id.user.0[..], &device.id.device.to_be_bytes()].concat();
    has(
        &bytes_of(folder, &|name| !name.starts_with("MANIFEST")),
        &key,
    )
}

fn bytes_of(folder: &Path, is_wanted: &impl Fn(&str) -> bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in unless_gone(fs::read_dir(folder)).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            bytes.extend(bytes_of(&path, is_wanted));
        } else if path.is_file() && is_wanted(path.file_name().unwrap().to_str().unwrap()) {
            // The operator's door is a socket, and holds nothing.
            bytes.extend(unless_gone(fs::read(path)).unwrap_or_default());
        }
    }
    bytes
}

fn unless_gone<T>(result: io::Result<T>) -> Option<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        result => Some(result.unwrap()),
    }
}
