//! Files and folders that are still there, whole, after a crash or a loss of power.
//!
//! A file's content is safe when the file was synced, and its name when the folder was that it is in.
//! Knows that, and nothing of what is in the files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Makes a folder, and those above it if need be. When it returns, a folder that it made stays.
///
/// # Errors
/// When the folder is not there and cannot be made, or cannot be synced.
pub(crate) fn create_folder(path: &Path) -> io::Result<()> {
    let made = match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_folder(parent(path))?;
            fs::create_dir(path)
        }
        made => made,
    };
    match made {
        Ok(()) => sync_folder(parent(path)),
        // Perhaps made by a process that was killed before it could sync. Somebody else's folder may lie
        // in one that we cannot read.
        Err(_) if path.is_dir() => match sync_folder(parent(path)) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
            _ => Ok(()),
        },
        Err(error) => Err(error),
    }
}

/// Writes a file that is there as a whole or not at all, whatever happens; one of that name is replaced.
/// A crash may leave a part of it under the name with `.new` at its end, which the next attempt replaces.
///
/// # Errors
/// When it cannot be written or synced; the old file is then still there, or the new one already.
pub(crate) fn replace_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = NewFile::begin(path, mode)?;
    file.write_all(content)?;
    file.finish()
}

/// A file that is written piece by piece, and is not there under its name before it is whole. Dropped before that, it
/// goes; a crash may leave it under the name with `.new` at its end, which the next attempt replaces.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: File,
    /// Where it is now; none once it is in its place.
    new: Option<PathBuf>,
    path: PathBuf,
}

impl NewFile {
    /// Begins one, with nothing in it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn begin(path: &Path, mode: u32) -> io::Result<Self> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        // An older one may have another mode.
        if let Err(error) = fs::remove_file(&new)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        Ok(Self {
            file,
            new: Some(new),
            path: path.to_owned(),
        })
    }

    /// Puts it in its place, where an older one may be. When it returns, it stays there.
    ///
    /// # Errors
    /// When it cannot be synced or renamed; the old file is then still there, or the new one already.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(new) = &self.new {
            fs::rename(new, &self.path)?;
        }
        self.new = None;
        sync_folder(parent(&self.path))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(new) = &self.new {
            // One that stays is no harm: it is not under its name.
            fs::remove_file(new).ok();
        }
    }
}

/// Makes the names in a folder safe as they are now.
///
/// # Errors
/// When the system cannot promise it.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_is_made_with_those_above_it_and_may_be_there_already() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_folder(&deep).unwrap();
        create_folder(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(create_folder(&dir.path().join("file")).is_err());
        assert!(create_folder(&dir.path().join("file/below")).is_err());
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_also_after_an_attempt_that_was_cut_short() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(
            dir.path().join("file.new"),
            "a longer part of an earlier attempt",
        )
        .unwrap();
        replace_file(&path, b"one", 0o600).unwrap();
        replace_file(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_was_not_finished_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace_file(&path, b"one", 0o600).unwrap();
        let mut new = NewFile::begin(&path, 0o600).unwrap();
        new.write_all(b"two").unwrap();
        drop(new);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
