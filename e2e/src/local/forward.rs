//! Carries TCP connections from a port of this machine into a cluster's network.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// More connections wait to be accepted.
const MOST_CONNECTIONS: usize = 1024;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Accepting fails for a while where file handles run out.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Takes connections from the listening socket that is standard input and carries
/// each to `target`. Runs until it is killed.
pub async fn from_standard_input(target: SocketAddr) -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let listener = std::net::TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    serve(TcpListener::from_std(listener)?, target).await
}

async fn serve(listener: TcpListener, target: SocketAddr) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let place = Arc::clone(&places)
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                eprintln!("accepting a connection: {error}");
                tokio::time::sleep(AFTER_FAILURE).await;
                continue;
            }
        };
        tokio::spawn(async move {
            if let Err(error) = carry(client, target).await {
                eprintln!("a connection to {target}: {error}");
            }
            drop(place);
        });
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let mut server = tokio::time::timeout(CONNECT_WITHIN, TcpStream::connect(target)).await??;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut client, &mut server)
        .await
        .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn bytes_go_both_ways() {
        let target = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target_address = target.local_addr().unwrap();
        let outer = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let outer_address = outer.local_addr().unwrap();
        tokio::spawn(serve(outer, target_address));
        tokio::spawn(async move {
            let (mut stream, _) = target.accept().await.unwrap();
            let mut question = [0; 4];
            stream.read_exact(&mut question).await.unwrap();
            assert_eq!(&question, b"ping");
            stream.write_all(b"pong").await.unwrap();
        });
        let mut client = TcpStream::connect(outer_address).await.unwrap();
        client.write_all(b"ping").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "pong");
    }
}
