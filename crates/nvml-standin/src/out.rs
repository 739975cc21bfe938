//! Writes through pointers that a caller of a C library gave. A null pointer is an invalid argument, as with NVML.
#![expect(unsafe_code, reason = "a C library's face: results go through the caller's pointers")]

use std::ffi::{CStr, c_char};

use nvml_wrapper_sys::bindings as sys;

/// A code of NVML other than success.
pub(crate) type Code = sys::nvmlReturn_t;

pub(crate) const INVALID: Code = sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const TOO_SMALL: Code = sys::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;

/// Writes a value.
///
/// # Safety
/// `to` is null, or points to a `T` that may be written.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID);
    }
    // SAFETY: not null, so by contract it may be written.
    unsafe { to.write(value) };
    Ok(())
}

/// Writes text with its end.
///
/// # Safety
/// `to` is null, or points to `length` characters that may be written.
pub(crate) unsafe fn put_text(to: *mut c_char, length: u32, text: &str) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID);
    }
    if text.len() >= length as usize {
        return Err(TOO_SMALL);
    }
    // SAFETY: `text.len() + 1` characters are at most `length`, which may be written; the two do not overlap, since the
    // text is ours.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// Writes a list as NVML does: the count goes both ways, and a list that is too short is told how long it has to be.
///
/// # Safety
/// `count` is null, or may be read and written; `to` is null, or points to as many `T` that may be written as `count` says.
pub(crate) unsafe fn put_list<T: Copy>(count: *mut u32, to: *mut T, items: &[T]) -> Result<(), Code> {
    if count.is_null() {
        return Err(INVALID);
    }
    let there = u32::try_from(items.len()).unwrap_or(u32::MAX);
    // SAFETY: not null, so by contract it may be read and written.
    let room = unsafe { count.replace(there) };
    if room < there {
        return Err(TOO_SMALL);
    }
    if !items.is_empty() {
        if to.is_null() {
            return Err(INVALID);
        }
        // SAFETY: the caller says that there is room for `room` items, which are at least as many.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), to, items.len()) };
    }
    Ok(())
}

/// Reads text.
///
/// # Safety
/// `from` is null, or points to text with its end.
pub(crate) unsafe fn text(from: *const c_char) -> Result<String, Code> {
    if from.is_null() {
        return Err(INVALID);
    }
    // SAFETY: not null, so by contract it is text with its end.
    unsafe { CStr::from_ptr(from) }.to_str().map(str::to_owned).map_err(|_| INVALID)
}

/// Fixed room for text, filled up with zeros.
pub(crate) fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut room = [0; N];
    for (to, from) in room.iter_mut().take(N - 1).zip(text.bytes()) {
        *to = from as c_char;
    }
    room
}
