//! Holds the namespaces of a pod open until the runtime kills it.

fn main() {
    loop {
        std::thread::park();
    }
}
