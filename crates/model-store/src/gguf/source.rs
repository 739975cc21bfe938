//! Reads a header piece by piece through one small buffer, counting and hashing what it reads.

use std::io::{ErrorKind, Read, Seek, SeekFrom};

use sha2::{Digest, Sha256};

use super::limits::{MAX_HEADER, MAX_READ, PIECE};
use crate::ProfileError;
use crate::file_problem;

/// A header being read. What is skipped is not read from the disk unless it lies in the buffer already.
pub(super) struct Source<R> {
    reader: R,
    /// Length of the file.
    length: u64,
    buffer: Vec<u8>,
    /// Part of the buffer that holds bytes not yet taken; it begins at `at` in the file.
    start: usize,
    end: usize,
    /// Bytes of the buffer before this one are hashed (or were skipped).
    hashed: usize,
    at: u64,
    read: u64,
    digest: Sha256,
}

impl<R: Read + Seek> Source<R> {
    /// A file from its first byte on. `read` and `digest` go on from an earlier part of the same model.
    pub(super) fn new(reader: R, length: u64, read: u64, digest: Sha256) -> Self {
        Self { reader, length, buffer: vec![0; PIECE], start: 0, end: 0, hashed: 0, at: 0, read, digest }
    }

    /// Position in the file.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Length of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes that may still be taken.
    pub(super) fn allowance(&self) -> u64 {
        MAX_READ - self.read
    }

    /// Bytes taken so far and their digest.
    pub(super) fn finish(mut self) -> (u64, Sha256) {
        self.hash();
        (self.read, self.digest)
    }

    /// The next `n` bytes, at most [`PIECE`].
    pub(super) fn take(&mut self, n: usize) -> Result<&[u8], ProfileError> {
        debug_assert!(n <= PIECE, "a piece fits into the buffer");
        self.fits(n as u64)?;
        if n as u64 > self.allowance() {
            return Err(too_large(self.read + n as u64, MAX_READ));
        }
        while self.end - self.start < n {
            self.fill()?;
        }
        let piece = self.start..self.start + n;
        self.start += n;
        self.at += n as u64;
        self.read += n as u64;
        Ok(&self.buffer[piece])
    }

    /// Goes `n` bytes on without looking at them.
    pub(super) fn skip(&mut self, n: u64) -> Result<(), ProfileError> {
        self.fits(n)?;
        // Whether skipped bytes lie in the buffer must not change the digest.
        self.hash();
        let buffered = (self.end - self.start) as u64;
        if n <= buffered {
            self.start += n as usize;
        } else {
            self.reader.seek(SeekFrom::Start(self.at + n)).map_err(unreadable)?;
            (self.start, self.end) = (0, 0);
        }
        self.hashed = self.start;
        self.at += n;
        Ok(())
    }

    pub(super) fn u32(&mut self) -> Result<u32, ProfileError> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, ProfileError> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string of at most `limit` bytes (and at most [`PIECE`]).
    pub(super) fn string(&mut self, what: &'static str, limit: usize) -> Result<&[u8], ProfileError> {
        let value = self.u64()?;
        match usize::try_from(value) {
            Ok(n) if n <= limit.min(PIECE) => self.take(n),
            _ => Err(ProfileError::TooLarge { what, value, limit: limit as u64 }),
        }
    }

    /// Whether `n` more bytes lie in the file and in the part of it that may be a header.
    pub(super) fn fits(&self, n: u64) -> Result<(), ProfileError> {
        match self.at.checked_add(n) {
            Some(end) if end > MAX_HEADER && self.length > MAX_HEADER => Err(too_large(end, MAX_HEADER)),
            Some(end) if end <= self.length => Ok(()),
            end => {
                let end = end.unwrap_or(u64::MAX);
                Err(ProfileError::CutShort { what: "the header", end, length: self.length })
            }
        }
    }

    fn hash(&mut self) {
        self.digest.update(&self.buffer[self.hashed..self.start]);
        self.hashed = self.start;
    }

    fn fill(&mut self) -> Result<(), ProfileError> {
        self.hash();
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end, self.hashed) = (0, self.end - self.start, 0);
        loop {
            match self.reader.read(&mut self.buffer[self.end..]) {
                // Shorter than it was when its length was asked for.
                Ok(0) => {
                    let length = self.at + self.end as u64;
                    return Err(ProfileError::CutShort { what: "the header", end: length + 1, length });
                }
                Ok(n) => {
                    self.end += n;
                    return Ok(());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(unreadable(e)),
            }
        }
    }
}

fn too_large(value: u64, limit: u64) -> ProfileError {
    ProfileError::TooLarge { what: "a header", value, limit }
}

#[allow(clippy::needless_pass_by_value, reason = "the form map_err wants")]
fn unreadable(error: std::io::Error) -> ProfileError {
    ProfileError::Unreadable(file_problem(&error))
}
