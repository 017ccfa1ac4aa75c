//! How ranks of several pods find each other.
//!
//! Rank 0 listens at the rendezvous address. Every other rank connects, says
//! who it is and where it listens, and receives the roster once all have come.
//! That connection stays as the link to rank 0 where the two need one; the
//! remaining pairs that do connect directly, the higher rank calling the lower one.

mod identity;
#[cfg(test)]
mod tests;
mod wire;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use llama_model::blocks::KvCapacity;

use self::identity::{Answer, Hello, Verdict, judge};
pub use self::identity::{Identity, Member};
use self::wire::{HELLO_BYTES, ROSTER_BYTES, recv, send};

/// How long ranks wait for each other.
pub const RENDEZVOUS_DEADLINE: Duration = Duration::from_mins(2);
/// How long a caller gets to say who it is. Shorter than the silence limit: a
/// stranger that says nothing must not make its host seem silent.
const HELLO_LIMIT: Duration = Duration::from_secs(1);
/// Pause between tries.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long one attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// The ranks did not come together.
#[derive(Debug, thiserror::Error)]
pub enum RendezvousError {
    /// The address cannot be listened on.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Not all ranks came in time.
    #[error("ranks {missing:?} did not come to {address} within {seconds} s")]
    Missing {
        /// Who is missing.
        missing: Vec<u32>,
        /// Where rank 0 waits.
        address: SocketAddr,
        /// How long it waited.
        seconds: u64,
    },
    /// Rank 0 could not be reached in time.
    #[error("rank {rank} did not get through to {address} within {seconds} s: {last}")]
    Unreachable {
        /// The rank that tried.
        rank: u32,
        /// Where it tried.
        address: String,
        /// How long it tried.
        seconds: u64,
        /// What the last try said.
        last: String,
    },
    /// Rank 0 sent this rank away.
    #[error("rank 0 refused rank {rank}: {reason}")]
    Refused {
        /// The rank that was refused.
        rank: u32,
        /// Why.
        reason: String,
    },
    /// A rank of this group runs something else.
    #[error("rank {rank} on node {node} disagrees: {reason}")]
    Disagreement {
        /// The rank.
        rank: u32,
        /// Its node.
        node: String,
        /// What differs.
        reason: String,
    },
    /// A connection between two ranks failed while the mesh was built.
    #[error("connect rank {rank} to rank {peer}")]
    Mesh {
        /// This rank.
        rank: u32,
        /// The other end.
        peer: u32,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl RendezvousError {
    /// The rank to blame, where one is known.
    pub fn rank(&self) -> Option<u32> {
        match self {
            Self::Disagreement { rank, .. } | Self::Refused { rank, .. } => Some(*rank),
            Self::Mesh { peer, .. } => Some(*peer),
            Self::Missing { missing, .. } => missing.first().copied(),
            Self::Listen { .. } | Self::Unreachable { .. } => None,
        }
    }
}

/// A group that has come together.
#[derive(Debug)]
pub struct Mesh {
    /// One connection for every rank that needs one with ours, by rank.
    pub connections: Vec<Option<TcpStream>>,
    /// All ranks, in order.
    pub members: Vec<Member>,
}

impl Mesh {
    /// What every pod has memory for; `None` in a group of no ranks.
    pub fn capacity(&self) -> Option<KvCapacity> {
        let capacities = self.members.iter().map(|member| member.capacity);
        capacities.reduce(KvCapacity::min)
    }
}

/// What one rank brings to the rendezvous.
#[derive(Clone)]
pub struct Party {
    /// Shared secret of the group's pods.
    pub token: String,
    /// What all must agree on.
    pub identity: Identity,
    /// This rank.
    pub rank: u32,
    /// Its node.
    pub node: String,
    /// What its pod has memory for.
    pub capacity: KvCapacity,
    /// Address of the pod, on which it listens.
    pub ip: IpAddr,
    /// How long to wait for the others.
    pub deadline: Duration,
}

impl std::fmt::Debug for Party {
    /// Without the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Party")
            .field("identity", &self.identity)
            .field("rank", &self.rank)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Party {
    /// Rank 0: waits at `port` for all other ranks.
    ///
    /// # Errors
    /// When they do not come in time or run something else.
    pub fn host(&self, port: u16) -> Result<Mesh, RendezvousError> {
        let address = SocketAddr::new(self.ip, port);
        let listener =
            listen(address).map_err(|source| RendezvousError::Listen { address, source })?;
        let started = Instant::now();
        let world = self.world();
        let mut guests: Vec<Option<(TcpStream, Member)>> = (0..world).map(|_| None).collect();
        let missing = |guests: &[Option<(TcpStream, Member)>]| -> Vec<u32> {
            (1..world)
                .filter(|rank| guests[*rank as usize].is_none())
                .collect()
        };
        loop {
            let absent = missing(&guests);
            if absent.is_empty() {
                break;
            }
            if started.elapsed() >= self.deadline {
                return Err(RendezvousError::Missing {
                    missing: absent,
                    address,
                    seconds: self.deadline.as_secs(),
                });
            }
            match listener.accept() {
                Ok((stream, from)) => {
                    if let Some(guest) = self.receive(stream, from)? {
                        let rank = guest.1.rank as usize;
                        if guests[rank].replace(guest).is_some() {
                            tracing::warn!(rank, "a rank came twice, the later one stays");
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(RETRY_PAUSE);
                }
                Err(source) => return Err(RendezvousError::Listen { address, source }),
            }
        }
        self.seat(address, guests)
    }

    /// Sends the roster to all guests.
    fn seat(
        &self,
        address: SocketAddr,
        guests: Vec<Option<(TcpStream, Member)>>,
    ) -> Result<Mesh, RendezvousError> {
        let mut members = vec![self.member(address)];
        let mut connections = vec![None];
        for (stream, member) in guests.into_iter().flatten() {
            members.push(member);
            connections.push(Some(stream));
        }
        let roster = Answer::Roster(members.clone());
        for (peer, connection) in (0..).zip(&mut connections) {
            if let Some(stream) = connection {
                send(stream, &roster).map_err(|source| RendezvousError::Mesh {
                    rank: 0,
                    peer,
                    source,
                })?;
            }
            if !self.connects(peer) {
                *connection = None;
            }
        }
        Ok(Mesh {
            connections,
            members,
        })
    }

    /// Hears one caller out. `None` when it was sent away.
    fn receive(
        &self,
        mut stream: TcpStream,
        from: SocketAddr,
    ) -> Result<Option<(TcpStream, Member)>, RendezvousError> {
        let hello: Hello = match prepare(&stream)
            .and_then(|()| recv(&mut stream, HELLO_BYTES, HELLO_LIMIT))
        {
            Ok(hello) => hello,
            Err(error) => {
                tracing::warn!(%from, %error, "a caller at the rendezvous said nothing readable");
                return Ok(None);
            }
        };
        let rank = hello.member.rank;
        let verdict = judge(&self.token, &self.identity, &hello);
        if let Verdict::Stranger(reason) | Verdict::Disagreement(reason) = &verdict {
            tracing::warn!(%from, rank, reason, "refuse a caller at the rendezvous");
            if let Err(error) = send(&mut stream, &Answer::Refused(reason.clone())) {
                tracing::debug!(%from, %error, "tell a caller why it is refused");
            }
        }
        match verdict {
            Verdict::Member => Ok(Some((stream, hello.member))),
            Verdict::Stranger(_) => Ok(None),
            Verdict::Disagreement(reason) => Err(RendezvousError::Disagreement {
                rank,
                node: hello.member.node,
                reason,
            }),
        }
    }

    /// Every other rank: goes to rank 0 at `address` and then meets the rest.
    ///
    /// # Errors
    /// When rank 0 cannot be reached or refuses, or a peer does not come.
    pub fn join(&self, address: &str) -> Result<Mesh, RendezvousError> {
        let own = SocketAddr::new(self.ip, 0);
        let listener = listen(own).map_err(|source| RendezvousError::Listen {
            address: own,
            source,
        })?;
        let listen_at = listener
            .local_addr()
            .map_err(|source| RendezvousError::Listen {
                address: own,
                source,
            })?;
        let started = Instant::now();
        let (first, members) = self.reach_host(address, listen_at, started)?;
        let mesh_error = |peer: u32| {
            move |source| RendezvousError::Mesh {
                rank: self.rank,
                peer,
                source,
            }
        };
        let mut connections: Vec<Option<TcpStream>> = members.iter().map(|_| None).collect();
        connections[0] = self.connects(0).then_some(first);
        for member in &members[1..] {
            if member.rank < self.rank && self.connects(member.rank) {
                let stream = self.call(member.listen).map_err(mesh_error(member.rank))?;
                connections[member.rank as usize] = Some(stream);
            }
        }
        let missing = |connections: &[Option<TcpStream>]| {
            (self.rank + 1..self.world())
                .find(|rank| self.connects(*rank) && connections[*rank as usize].is_none())
        };
        while let Some(peer) = missing(&connections) {
            if started.elapsed() >= self.deadline {
                return Err(mesh_error(peer)(ErrorKind::TimedOut.into()));
            }
            match listener.accept() {
                Ok((stream, from)) => {
                    if let Some((rank, stream)) = self.answer(stream, from) {
                        connections[rank as usize] = Some(stream);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(RETRY_PAUSE / 10);
                }
                Err(source) => return Err(mesh_error(peer)(source)),
            }
        }
        Ok(Mesh {
            connections,
            members,
        })
    }

    /// Tries until rank 0 has answered with the roster.
    fn reach_host(
        &self,
        address: &str,
        listen: SocketAddr,
        started: Instant,
    ) -> Result<(TcpStream, Vec<Member>), RendezvousError> {
        let mut last = "not tried".to_owned();
        while started.elapsed() < self.deadline {
            match self.greet(address, listen) {
                Ok(mut stream) => match self.await_roster(&mut stream, started) {
                    Ok(Answer::Roster(members)) => {
                        if (0..self.world()).eq(members.iter().map(|member| member.rank)) {
                            return Ok((stream, members));
                        }
                        last = format!("a roster of {} ranks", members.len());
                    }
                    Ok(Answer::Refused(reason)) => {
                        return Err(RendezvousError::Refused {
                            rank: self.rank,
                            reason,
                        });
                    }
                    Err(error) => last = error.to_string(),
                },
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(RETRY_PAUSE);
        }
        Err(RendezvousError::Unreachable {
            rank: self.rank,
            address: address.to_owned(),
            seconds: self.deadline.as_secs(),
            last,
        })
    }

    fn greet(&self, address: &str, listen: SocketAddr) -> std::io::Result<TcpStream> {
        let mut last = std::io::Error::from(ErrorKind::NotFound);
        for candidate in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&candidate, CONNECT_LIMIT) {
                Ok(mut stream) => {
                    prepare(&stream)?;
                    send(&mut stream, &self.hello(listen))?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Waits for rank 0's answer, which comes when the last rank has come.
    fn await_roster(&self, stream: &mut TcpStream, started: Instant) -> std::io::Result<Answer> {
        let left = self.deadline.saturating_sub(started.elapsed());
        recv(stream, ROSTER_BYTES, left.max(RETRY_PAUSE))
    }

    /// Connects to a lower rank.
    fn call(&self, address: SocketAddr) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT)?;
        prepare(&stream)?;
        let hello = self.hello(stream.local_addr()?);
        send(&mut stream, &hello)?;
        Ok(stream)
    }

    /// Hears a higher rank out; `None` when it is none of ours.
    fn answer(&self, mut stream: TcpStream, from: SocketAddr) -> Option<(u32, TcpStream)> {
        let hello: Hello =
            match prepare(&stream).and_then(|()| recv(&mut stream, HELLO_BYTES, HELLO_LIMIT)) {
                Ok(hello) => hello,
                Err(error) => {
                    tracing::warn!(%from, %error, "a caller said nothing readable");
                    return None;
                }
            };
        let rank = hello.member.rank;
        let verdict = judge(&self.token, &self.identity, &hello);
        if verdict == Verdict::Member && rank > self.rank && self.connects(rank) {
            return Some((rank, stream));
        }
        tracing::warn!(%from, rank, ?verdict, "refuse a caller");
        None
    }

    /// Ranks of the group.
    fn world(&self) -> u32 {
        u32::try_from(self.identity.placement.world()).unwrap_or(u32::MAX)
    }

    /// Whether this rank needs a connection of its own to `peer`.
    fn connects(&self, peer: u32) -> bool {
        let placement = self.identity.placement;
        placement.connects(self.rank as usize, peer as usize)
    }

    fn member(&self, listen: SocketAddr) -> Member {
        Member {
            rank: self.rank,
            node: self.node.clone(),
            capacity: self.capacity,
            listen,
        }
    }

    fn hello(&self, listen: SocketAddr) -> Hello {
        Hello {
            token: self.token.clone(),
            identity: self.identity.clone(),
            member: self.member(listen),
        }
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(HELLO_LIMIT))
}
