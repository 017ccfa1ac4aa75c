//! Messages of the rendezvous: JSON behind its length.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest greeting, in bytes. Anybody can send one.
pub(super) const HELLO_BYTES: u32 = 64 * 1024;
/// Longest answer to a greeting, in bytes: the particulars of all ranks.
pub(super) const ROSTER_BYTES: u32 = 4 * 1024 * 1024;
/// Bytes for which room is made before they have come.
const STEP: usize = 64 * 1024;

/// Sends `message`.
///
/// # Errors
/// When the connection breaks.
pub(super) fn send<T: Serialize>(stream: &mut TcpStream, message: &T) -> std::io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let len = u32::try_from(json.len())
        .ok()
        .filter(|len| *len <= ROSTER_BYTES)
        .ok_or(ErrorKind::InvalidInput)?;
    stream.write_all(&len.to_le_bytes())?;
    stream.write_all(&json)
}

/// Reads a message of up to `limit` bytes that comes whole within `patience`,
/// however slowly its bytes trickle in.
///
/// # Errors
/// When the connection breaks, time runs out, or it is another kind of message.
pub(super) fn recv<T: DeserializeOwned>(
    stream: &mut TcpStream,
    limit: u32,
    patience: Duration,
) -> std::io::Result<T> {
    let deadline = Instant::now() + patience;
    let mut len = [0; 4];
    fill(stream, &mut len, deadline)?;
    let len = u32::from_le_bytes(len);
    if len > limit {
        let reason = format!("a message of {len} bytes, at most {limit} are read");
        return Err(std::io::Error::new(ErrorKind::InvalidData, reason));
    }
    let len = len as usize;
    let mut json = Vec::new();
    while json.len() < len {
        let start = json.len();
        json.resize(len.min(start + STEP), 0);
        fill(stream, &mut json[start..], deadline)?;
    }
    Ok(serde_json::from_slice(&json)?)
}

fn fill(stream: &mut TcpStream, buffer: &mut [u8], deadline: Instant) -> std::io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn long_messages_arrive_and_longer_ones_are_refused_unread() {
        let text = "x".repeat(3 * STEP);
        let (mut near, mut far) = pair();
        let patience = Duration::from_secs(20);
        std::thread::scope(|scope| {
            scope.spawn(|| send(&mut near, &text).unwrap());
            let read: String = recv(&mut far, ROSTER_BYTES, patience).unwrap();
            assert_eq!(read, text);
        });
        near.write_all(&u32::MAX.to_le_bytes()).unwrap();
        let error = recv::<String>(&mut far, HELLO_BYTES, patience).unwrap_err();
        assert!(error.to_string().contains("4294967295"), "{error}");
    }

    #[test]
    fn a_message_that_trickles_in_runs_out_of_time() {
        let (mut near, mut far) = pair();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut bytes = vec![b'1'; 1000];
                bytes[..4].copy_from_slice(&996_u32.to_le_bytes());
                for byte in bytes {
                    if near.write_all(&[byte]).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            let patience = Duration::from_millis(200);
            let error = recv::<u64>(&mut far, HELLO_BYTES, patience).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
                "{error}"
            );
            drop(far);
        });
    }
}
