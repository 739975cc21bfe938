//! Gives back the memory that only the start needed.
//!
//! A shim sleeps for months beside its engine, and there is one per engine. Most of what it has mapped by then is code
//! that ran once: the dynamic linker's, JSON's, that of the program it is a part of.
#![expect(unsafe_code, reason = "madvise takes addresses")]

use std::ffi::c_void;
use std::fs;
use std::ptr;

use rustix::mm::{Advice, madvise};

/// Takes all code of this process out of its resident set; what still runs comes back from the page cache.
pub(crate) fn drop_code() {
    // Without /proc it stays, and nothing is wrong.
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    for (start, len) in maps.lines().filter_map(code_of_a_file) {
        let start = ptr::without_provenance_mut::<c_void>(start);
        // SAFETY: nobody holds a reference into code, and dropping pages of a mapping that was never writable loses
        // nothing: the next access reads the same bytes of the file again (madvise(2), MADV_DONTNEED).
        let _kept = unsafe { madvise(start, len, Advice::LinuxDontNeed) };
    }
}

/// Start and length of a mapping of a file's code, in a line of proc_pid_maps(5).
fn code_of_a_file(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions, _offset, _device, inode) =
        (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    // Exactly so: read-only data may hold what the linker wrote before it was made read-only.
    if permissions != "r-xp" || inode == "0" {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    Some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_files_is_dropped() {
        let line = |permissions, inode| format!("1000-3000 {permissions} 00001000 fe:00 {inode}    /usr/bin/x");
        assert_eq!(code_of_a_file(&line("r-xp", "12")), Some((0x1000, 0x2000)));
        for (permissions, inode) in [("rw-p", "12"), ("r--p", "12"), ("rwxp", "12"), ("r-xs", "12"), ("r-xp", "0")] {
            assert_eq!(code_of_a_file(&line(permissions, inode)), None, "{permissions} {inode}");
        }
        assert_eq!(code_of_a_file("rubbish"), None);
    }
}
