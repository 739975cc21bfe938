//! Which sockets listen on a port: asked of the kernel by sock_diag(7), which looks at listening sockets alone. Its
//! tables in /proc hold every connection, and reading them takes milliseconds where there are thousands.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// `SOCK_DIAG_BY_FAMILY` of linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_DUMP` of linux/netlink.h.
const DUMP: u16 = 0x1 | 0x300;
/// `NLMSG_ERROR` and `NLMSG_DONE` of the same.
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `TCP_LISTEN` of net/tcp_states.h.
const LISTEN: u32 = 10;
/// Sizes of `nlmsghdr`, and of `inet_diag_req_v2` and `inet_diag_msg` of linux/inet_diag.h.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// Where address and inode stand in the last.
const ADDRESS: usize = 8;
const INODE: usize = 68;

/// The addresses on which somebody listens at this port, each with the inode of its socket.
pub(crate) fn at_port(port: u16) -> io::Result<Vec<(SocketAddr, u64)>> {
    let mut found = Vec::new();
    for family in [AddressFamily::INET, AddressFamily::INET6] {
        ask(family, port, &mut found)?;
    }
    Ok(found)
}

fn ask(family: AddressFamily, port: u16, found: &mut Vec<(SocketAddr, u64)>) -> io::Result<()> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
    let own_family = u8::try_from(family.as_raw()).map_err(|_| ErrorKind::InvalidInput)?;
    let mut request = Vec::with_capacity(HEADER + REQUEST);
    let length = u32::try_from(HEADER + REQUEST).map_err(|_| ErrorKind::InvalidInput)?;
    request.extend(length.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([own_family, 6, 0, 0]);
    request.extend((1u32 << LISTEN).to_ne_bytes());
    request.extend(port.to_be_bytes());
    request.resize(HEADER + REQUEST, 0);
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut buffer = [0; 8192];
    loop {
        let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= HEADER {
            let size = word(rest, 0) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            if size < HEADER || size > rest.len() {
                return Err(ErrorKind::InvalidData.into());
            }
            match kind {
                DONE => return Ok(()),
                ERROR => return Err(ErrorKind::Unsupported.into()),
                _ => found.extend(listener(&rest[HEADER..size], port)),
            }
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
    }
}

fn listener(message: &[u8], port: u16) -> Option<(SocketAddr, u64)> {
    if message.len() < MESSAGE {
        return None;
    }
    let address = &message[ADDRESS..ADDRESS + 16];
    let ip = if i32::from(message[0]) == i32::from(AddressFamily::INET.as_raw()) {
        IpAddr::V4(Ipv4Addr::new(address[0], address[1], address[2], address[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(address).ok()?))
    };
    Some((SocketAddr::new(ip, port), word(message, INODE).into()))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_the_sockets_that_the_tables_of_proc_name() {
        for bind in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            // A machine may have no IPv6.
            let Ok(socket) = std::net::TcpListener::bind(bind) else { continue };
            let addr = socket.local_addr().unwrap();
            let inode = |text: &str| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
            let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
            let own = inode(&link.to_string_lossy()).unwrap();
            assert_eq!(at_port(addr.port()).unwrap(), [(addr, own)]);
            drop(socket);
            assert_eq!(at_port(addr.port()).unwrap(), []);
        }
    }
}
