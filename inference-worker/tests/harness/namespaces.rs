//! Two network namespaces joined by a virtual cable, with no other way out.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Addresses in each namespace: as many pods can be there.
const ADDRESSES: u8 = 4;

/// A network namespace, which is gone when this is, or when the test ends.
#[derive(Debug)]
pub(crate) struct Namespace {
    /// Reads its standard input, of which the other end is ours, and so ends with us.
    holder: Child,
    number: u8,
}

/// The namespaces; `None` with a note where this user cannot make any.
pub(crate) fn pair() -> Option<[Arc<Namespace>; 2]> {
    let pair = rustix::process::geteuid()
        .is_root()
        .then(|| Some([Namespace::new(1)?, Namespace::new(2)?]))
        .flatten();
    let Some([first, second]) = pair else {
        eprintln!("network namespaces are for root, with unshare and ip: nothing was tested");
        return None;
    };
    let other = second.holder.id();
    first.ip(&format!(
        "link add cable type veth peer name cable netns {other}\n"
    ));
    for namespace in [&first, &second] {
        let addresses: Vec<String> = (0..ADDRESSES)
            .map(|index| format!("addr add {}/24 dev cable\n", namespace.address(index)))
            .collect();
        let addresses = addresses.concat();
        namespace.ip(&format!("link set lo up\n{addresses}link set cable up\n"));
    }
    Some([first, second].map(Arc::new))
}

impl Namespace {
    fn new(number: u8) -> Option<Self> {
        let mut holder = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut ready = [0; 6];
        let said = std::io::Read::read_exact(holder.stdout.as_mut()?, &mut ready);
        let namespace = Self { holder, number };
        said.ok()
            .filter(|()| &ready == b"ready\n")
            .map(|()| namespace)
    }

    /// One of its addresses.
    pub(crate) fn address(&self, index: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 217, 0, 16 * self.number + index)
    }

    /// A command that runs `program` inside. Its process is the program itself.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let target = self.holder.id().to_string();
        command.args(["-t", &target, "-n", "--", program]);
        command
    }

    /// What `work` returns on a thread inside: sockets that it makes are there.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/proc/{}/ns/net", self.holder.id());
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let namespace = std::fs::File::open(path).unwrap();
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                work()
            });
            inside.join().unwrap()
        })
    }

    /// Pulls the cable.
    pub(crate) fn cut(&self) {
        self.ip("link set cable down\n");
    }

    fn ip(&self, batch: &str) {
        let mut ip = self
            .command("ip")
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = ip.stdin.take().unwrap();
        input.write_all(batch.as_bytes()).unwrap();
        drop(input);
        assert!(ip.wait().unwrap().success(), "ip -batch:\n{batch}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
