//! Tries names and addresses from inside a pod.
//!
//! ```text
//! llama-probe serve PORT TEXT    answers every HTTP request with TEXT
//! llama-probe get HOST:PORT      prints what HOST answers to GET /
//! llama-probe lookup NAME        prints the addresses of NAME, one a line
//! ```

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use llama_pause::dns::Resolver;

const RESOLVER: &str = "/etc/resolv.conf";
const END_OF_HEAD: &str = "\r\n\r\n";
const LONGEST_REQUEST: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["serve", port, text] => serve(port, text),
        ["get", target] => get(target),
        ["lookup", name] => lookup(name),
        _ => Err(io::Error::other(
            "expected: serve PORT TEXT, get HOST:PORT or lookup NAME",
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("llama-probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str, text: &str) -> io::Result<()> {
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    writeln!(io::stdout(), "serving on port {port}")?;
    for connection in listener.incoming() {
        // A client that leaves early is its own affair.
        if let Err(error) = connection.and_then(|stream| answer(stream, text)) {
            eprintln!("llama-probe: {error}");
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream, text: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    // Closing with a part of the request unread would reset the connection.
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.ends_with(END_OF_HEAD.as_bytes()) && request.len() < LONGEST_REQUEST {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            read => request.extend(&buffer[..read]),
        }
    }
    let length = text.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close");
    stream.write_all(format!("{head}{END_OF_HEAD}{text}").as_bytes())
}

fn get(target: &str) -> io::Result<()> {
    let (host, port) = target
        .rsplit_once(':')
        .ok_or_else(|| io::Error::other(format!("expected HOST:PORT, got {target:?}")))?;
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let address = match host.parse::<IpAddr>() {
        Ok(address) => address,
        Err(_) => IpAddr::from(*addresses(host)?.first().ok_or_else(|| unknown(host))?),
    };
    let mut stream = TcpStream::connect_timeout(&(address, port).into(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let head = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close");
    stream.write_all(format!("{head}{END_OF_HEAD}").as_bytes())?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let body = response
        .split_once(END_OF_HEAD)
        .map_or("", |(_, body)| body);
    writeln!(io::stdout(), "{body}")
}

fn lookup(name: &str) -> io::Result<()> {
    let found = addresses(name)?;
    if found.is_empty() {
        return Err(unknown(name));
    }
    for address in found {
        writeln!(io::stdout(), "{address}")?;
    }
    Ok(())
}

fn addresses(name: &str) -> io::Result<Vec<Ipv4Addr>> {
    Resolver::parse(&std::fs::read_to_string(RESOLVER)?).lookup(name)
}

fn unknown(name: &str) -> io::Error {
    io::Error::other(format!("{name} has no address"))
}
