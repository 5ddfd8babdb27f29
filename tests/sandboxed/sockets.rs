//! Sockets that a process holds when it is taken over: each sends to the peer that it is
//! connected to, and to nobody else.
//!
//! Each attempt succeeds outside the sandbox, which shows that the sandbox is what stops it.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use rustix::cmsg_space;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use socket2::{SockFilter, SockRef, TcpKeepalive};

use super::End::{Done, Refused};
use super::{Attempt, ENOSYS, Place};

/// Sockets of the kinds that a server holds, made before the sandbox is entered.
pub(super) struct Held {
    pub(super) listener: TcpListener,
    /// A connection that came in.
    accepted: TcpStream,
    /// Its other end.
    _client: TcpStream,
    pub(super) unix: [UnixStream; 2],
    /// Bound, and connected to nobody.
    udp: UdpSocket,
}

impl Held {
    pub(super) fn new() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let client = TcpStream::connect(listener.local_addr()?)?;
        let (accepted, _) = listener.accept()?;
        let (one, other) = UnixStream::pair()?;
        // What the second end can receive.
        pass(&one, &listener)?;
        let udp = UdpSocket::bind("127.0.0.1:0")?;
        Ok(Self { listener, accepted, _client: client, unix: [one, other], udp })
    }
}

pub(super) const SOCKETS: &[Attempt] = &[
    // What serving takes.
    ("send to a peer", send_to_a_peer, Done),
    ("end the sending", |place| place.held.accepted.shutdown(Shutdown::Write), Done),
    ("set keepalive and delay", tune, Done),
    ("ask for an error", |place| place.held.accepted.take_error().map(drop), Done),
    ("make a pair of streams", |_| UnixStream::pair().map(drop), Done),
    // Other receivers.
    ("connect by a listener", connect_by_a_listener, Refused(ENOSYS)),
    ("connect by sending", |place| fast_open(&place.socket, place), Refused(ENOSYS)),
    (
        "shut down the receiving",
        |place| place.held.accepted.shutdown(Shutdown::Read),
        Refused(ENOSYS),
    ),
    (
        "shut down both directions",
        |place| place.held.accepted.shutdown(Shutdown::Both),
        Refused(ENOSYS),
    ),
    ("make a pair for datagrams", send_by_a_pair, Refused(ENOSYS)),
    ("send past the manager", send_past_the_manager, Refused(ENOSYS)),
    ("send a UDP datagram", send_by_udp, Refused(ENOSYS)),
    // Descriptors.
    ("pass a descriptor", pass_a_descriptor, Refused(ENOSYS)),
    ("receive a descriptor", |place| receive(&place.held.unix[1]).map(drop), Refused(ENOSYS)),
    // Options.
    ("set an upper-layer protocol", set_upper_layer_protocol, Refused(ENOSYS)),
    ("connect fast later", connect_fast_later, Refused(ENOSYS)),
    ("attach a filter", attach_a_filter, Refused(ENOSYS)),
    (
        "bind to an interface",
        |place| SockRef::from(&place.socket).bind_device(Some(b"lo")),
        Refused(ENOSYS),
    ),
    (
        "set the congestion control",
        |place| SockRef::from(&place.held.accepted).set_tcp_congestion(b"reno"),
        Refused(ENOSYS),
    ),
    ("share a port", |place| SockRef::from(&place.socket).set_reuse_port(true), Refused(ENOSYS)),
    (
        "ask for credentials",
        |place| Ok(rustix::net::sockopt::socket_peercred(&place.held.unix[0]).map(drop)?),
        Refused(ENOSYS),
    ),
];

fn send_to_a_peer(place: &Place) -> io::Result<()> {
    let mut peer = &place.held.accepted;
    peer.write_all(b"x")?;
    assert_eq!(peer.write_vectored(&[IoSlice::new(b"x"), IoSlice::new(b"y")])?, 2);
    (&place.held.unix[0]).write_all(b"x")
}

/// As the gateway does with each connection.
fn tune(place: &Place) -> io::Result<()> {
    let socket = SockRef::from(&place.held.accepted);
    socket.set_tcp_nodelay(true)?;
    let second = Duration::from_secs(1);
    let keepalive = TcpKeepalive::new().with_time(second).with_interval(second).with_retries(1);
    socket.set_tcp_keepalive(&keepalive)
}

/// A listener that is shut down for reading is a socket that isn't connected.
fn connect_by_a_listener(place: &Place) -> io::Result<()> {
    rustix::net::shutdown(&place.held.listener, rustix::net::Shutdown::Read)?;
    fast_open(&place.held.listener, place)
}

/// Connects by a SYN with data.
pub(super) fn fast_open(socket: impl AsFd, place: &Place) -> io::Result<()> {
    let flags = SendFlags::from_bits_retain(libc::MSG_FASTOPEN.cast_unsigned());
    let receiver: SocketAddr = place.listener.as_socket().unwrap();
    rustix::net::sendto(&socket, b"x", flags, &receiver)?;
    // It is connected.
    assert_eq!(SockRef::from(&socket).peer_addr()?.as_socket(), Some(receiver));
    Ok(())
}

fn send_by_a_pair(place: &Place) -> io::Result<()> {
    let (one, _other) = UnixDatagram::pair()?;
    one.send_to(b"x", place.sockets("other")).map(drop)
}

/// The socket is connected to the manager, but a datagram may have another address.
fn send_past_the_manager(place: &Place) -> io::Result<()> {
    place.managers[0].send_to(b"x", place.sockets("other")).map(drop)
}

fn send_by_udp(place: &Place) -> io::Result<()> {
    let udp = &place.held.udp;
    udp.send_to(b"x", udp.local_addr()?).map(drop)
}

fn pass_a_descriptor(place: &Place) -> io::Result<()> {
    let [one, other] = &place.held.unix;
    pass(one, &place.held.udp)?;
    // The first one was there.
    receive(other)?;
    receive(other).map(drop)
}

pub(super) fn pass(socket: &impl AsFd, descriptor: &impl AsFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    rustix::net::sendmsg(socket, &[IoSlice::new(b"x")], &mut control, SendFlags::empty())?;
    Ok(())
}

pub(super) fn receive(socket: &impl AsFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let bytes = &mut [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::other("no descriptor came"))
}

/// Kernels without TLS look for it, and don't find it: the call has come through to them.
fn set_upper_layer_protocol(place: &Place) -> io::Result<()> {
    let set = setsockopt(&place.held.accepted, sockopt::TcpUlp::default(), &b"tls".as_slice());
    match set {
        Err(nix::Error::ENOENT) => Ok(()),
        set => Ok(set?),
    }
}

fn connect_fast_later(place: &Place) -> io::Result<()> {
    Ok(setsockopt(&place.socket, sockopt::TcpFastOpenConnect, &true)?)
}

/// One that lets all bytes through: to return the highest length.
fn attach_a_filter(place: &Place) -> io::Result<()> {
    let all = SockFilter::new(0x06, 0, 0, u32::MAX);
    SockRef::from(&place.held.accepted).attach_filter(&[all])
}
