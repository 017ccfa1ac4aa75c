//! Address (A) look-ups over UDP, as RFC 1035 describes them, with the search
//! list of `/etc/resolv.conf`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

const PORT: u16 = 53;
const HEADER_BYTES: usize = 12;
const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
const RESPONSE_CODE_MASK: u8 = 0x0f;
const NAME_ERROR: u8 = 3;
const RECURSION_DESIRED: u8 = 1;
/// How long one question may wait for its answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// What `/etc/resolv.conf` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolver {
    /// Where to ask, in order.
    pub servers: Vec<IpAddr>,
    /// Domains to try behind a short name.
    pub search: Vec<String>,
    /// Names with fewer dots than this are tried with the search list first.
    pub dots: usize,
}

impl Resolver {
    /// Reads the text of a `resolv.conf`; lines it does not know are skipped.
    pub fn parse(text: &str) -> Self {
        let mut resolver = Self {
            servers: Vec::new(),
            search: Vec::new(),
            dots: 1,
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => resolver
                    .servers
                    .extend(words.next().and_then(|word| word.parse::<IpAddr>().ok())),
                Some("search") => resolver.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    for option in words {
                        let dots = option.strip_prefix("ndots:").map(str::parse::<usize>);
                        if let Some(Ok(dots)) = dots {
                            resolver.dots = dots;
                        }
                    }
                }
                _ => {}
            }
        }
        resolver
    }

    /// The full names to ask for, in order.
    pub fn candidates(&self, name: &str) -> Vec<String> {
        if let Some(absolute) = name.strip_suffix('.') {
            return vec![absolute.to_owned()];
        }
        let mut searched: Vec<String> = self
            .search
            .iter()
            .map(|domain| format!("{name}.{domain}"))
            .collect();
        let plain = name.to_owned();
        if name.matches('.').count() < self.dots {
            searched.push(plain);
        } else {
            searched.insert(0, plain);
        }
        searched
    }

    /// The addresses of `name`; an empty list means that no such name exists.
    pub fn lookup(&self, name: &str) -> io::Result<Vec<Ipv4Addr>> {
        let Some(server) = self.servers.first() else {
            return Err(io::Error::other("resolv.conf names no server"));
        };
        for candidate in self.candidates(name) {
            let addresses = query(SocketAddr::new(*server, PORT), &candidate)?;
            if !addresses.is_empty() {
                return Ok(addresses);
            }
        }
        Ok(Vec::new())
    }
}

/// Asks `server` for the addresses of the full name `name`. An empty list means
/// that the name does not exist or has no address.
pub fn query(server: SocketAddr, name: &str) -> io::Result<Vec<Ipv4Addr>> {
    let id = u16::try_from(std::process::id() & 0xffff).unwrap_or_default();
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    socket.connect(server)?;
    socket.send(&question(id, name)?)?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer)?;
    answers(id, &buffer[..length])
}

fn question(id: u16, name: &str) -> io::Result<Vec<u8>> {
    let mut packet = id.to_be_bytes().to_vec();
    packet.extend([RECURSION_DESIRED, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        let length = u8::try_from(label.len())
            .ok()
            .filter(|length| (1..=63).contains(length))
            .ok_or_else(|| io::Error::other(format!("{name:?} is not a host name")))?;
        packet.push(length);
        packet.extend(label.as_bytes());
    }
    packet.push(0);
    packet.extend(TYPE_A.to_be_bytes());
    packet.extend(CLASS_IN.to_be_bytes());
    Ok(packet)
}

fn answers(id: u16, packet: &[u8]) -> io::Result<Vec<Ipv4Addr>> {
    read_answers(id, packet).ok_or_else(|| io::Error::other("the DNS answer is malformed"))?
}

/// None where the packet ends too early.
fn read_answers(id: u16, packet: &[u8]) -> Option<io::Result<Vec<Ipv4Addr>>> {
    if number(packet, 0)? != id {
        return Some(Err(io::Error::other(
            "the DNS answer is to another question",
        )));
    }
    match packet.get(3)? & RESPONSE_CODE_MASK {
        0 => {}
        NAME_ERROR => return Some(Ok(Vec::new())),
        code => {
            let message = format!("the DNS server answered with code {code}");
            return Some(Err(io::Error::other(message)));
        }
    }
    let (questions, count) = (number(packet, 4)?, number(packet, 6)?);
    let mut at = HEADER_BYTES;
    for _ in 0..questions {
        at = skip_name(packet, at)? + 4;
    }
    let mut addresses = Vec::new();
    for _ in 0..count {
        at = skip_name(packet, at)?;
        let (kind, length) = (number(packet, at)?, usize::from(number(packet, at + 8)?));
        let data = packet.get(at + 10..at + 10 + length)?;
        if kind == TYPE_A {
            addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?));
        }
        at += 10 + length;
    }
    Some(Ok(addresses))
}

fn number(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]))
}

/// Where the name that starts at `at` ends.
fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            // A pointer to an earlier name is two bytes and the last part.
            pointer if pointer & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_of_a_pod_is_read() {
        let resolver = Resolver::parse(
            "search default.svc.cluster.local svc.cluster.local cluster.local\n\
             nameserver 10.96.0.10\noptions ndots:5\n",
        );
        assert_eq!(resolver.servers, [IpAddr::from([10, 96, 0, 10])]);
        assert_eq!(resolver.search.len(), 3);
        assert_eq!(resolver.dots, 5);
    }

    #[test]
    fn short_names_are_searched_first_and_long_ones_last() {
        let resolver = Resolver {
            servers: Vec::new(),
            search: vec!["svc".to_owned()],
            dots: 2,
        };
        assert_eq!(resolver.candidates("a"), ["a.svc", "a"]);
        assert_eq!(resolver.candidates("a.b.c"), ["a.b.c", "a.b.c.svc"]);
        assert_eq!(resolver.candidates("a."), ["a"]);
    }

    #[test]
    fn question_has_labels_type_and_class() {
        let packet = question(0x0102, "ab.c").unwrap();
        assert_eq!(packet[..4], [1, 2, 1, 0]);
        assert_eq!(packet[12..], [2, b'a', b'b', 1, b'c', 0, 0, 1, 0, 1]);
        assert!(question(1, "a..b").is_err());
    }

    #[test]
    fn addresses_are_read_past_aliases_and_pointers() {
        let mut packet = question(7, "a.b").unwrap();
        packet[2] = 0x80;
        packet[7] = 2;
        // An alias (CNAME) first, then an address, both named by pointer.
        packet.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 5, 0, 2, 0xc0, 12]);
        packet.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 9]);
        assert_eq!(answers(7, &packet).unwrap(), [Ipv4Addr::new(10, 0, 0, 9)]);
    }

    #[test]
    fn bad_answers_are_errors_and_unknown_names_are_empty() {
        let mut packet = question(7, "a.b").unwrap();
        assert!(answers(8, &packet).is_err(), "another id");
        packet[3] = 3;
        assert_eq!(answers(7, &packet).unwrap(), Vec::<Ipv4Addr>::new());
        packet[3] = 2;
        assert!(answers(7, &packet).is_err(), "server failure");
        packet[3] = 0;
        packet[7] = 1;
        assert!(answers(7, &packet).is_err(), "an answer is missing");
    }
}
