use super::*;
use crate::adapters::AdapterArgs;
use crate::comm::placement::Placement;
use llama_model::Layout;

fn identity() -> Identity {
    Identity {
        group: "g".to_owned(),
        revision: "r1".to_owned(),
        epoch: 4,
        placement: Placement::new(Layout::tensor(3), 3).unwrap(),
        digest: "d".to_owned(),
        max_tokens: 128,
        compute: "f32".to_owned(),
        kv: "f16".to_owned(),
        adapters: AdapterArgs::default(),
        build: "1".to_owned(),
    }
}

fn party(rank: u32) -> Party {
    Party {
        token: "secret".to_owned(),
        identity: identity(),
        rank,
        node: format!("node-{rank}"),
        capacity: KvCapacity {
            slots: 8 - rank,
            blocks: 100 + rank,
            chunk_blocks: 9,
        },
        ip: IpAddr::from([127, 0, 0, 1]),
        deadline: Duration::from_secs(20),
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn callers_are_judged_by_what_they_run() {
    let listen = SocketAddr::from(([127, 0, 0, 1], 1));
    let judged = |change: &dyn Fn(&mut Hello)| {
        let mut hello = party(1).hello(listen);
        change(&mut hello);
        judge("secret", &identity(), &hello)
    };
    assert_eq!(judged(&|_| ()), Verdict::Member);
    for stranger in [
        judged(&|hello| hello.token = "guess".to_owned()),
        judged(&|hello| hello.identity.epoch = 3),
        judged(&|hello| hello.identity.group = "other".to_owned()),
    ] {
        assert!(matches!(stranger, Verdict::Stranger(_)), "{stranger:?}");
    }
    for (disagreement, word) in [
        (
            judged(&|hello| hello.identity.digest = "x".to_owned()),
            "digest",
        ),
        (
            judged(&|hello| hello.identity.placement.layout.tensor = 4),
            "tensor",
        ),
        (
            judged(&|hello| hello.identity.placement.layout.pipeline = 2),
            "pipeline",
        ),
        (
            judged(&|hello| hello.identity.placement.ranks_per_pod = 3),
            "ranks per node",
        ),
        (
            judged(&|hello| hello.identity.compute = "bf16".to_owned()),
            "compute type is bf16, expected f32",
        ),
        (
            judged(&|hello| hello.identity.kv = "f8".to_owned()),
            "KV cache type",
        ),
        (
            judged(&|hello| hello.identity.revision = "r2".to_owned()),
            "revision",
        ),
        (
            judged(&|hello| hello.identity.build = "2".to_owned()),
            "build",
        ),
        (judged(&|hello| hello.identity.max_tokens = 9), "max_tokens"),
        (judged(&|hello| hello.member.rank = 3), "rank 3"),
        (judged(&|hello| hello.member.rank = 0), "rank 0"),
    ] {
        match disagreement {
            Verdict::Disagreement(reason) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{word}: {other:?}"),
        }
    }
}

#[test]
fn ranks_find_each_other_past_strangers() {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    std::thread::scope(|scope| {
        let host = scope.spawn(|| party(0).host(port));
        let stranger = scope.spawn(|| {
            let mut stranger = party(1);
            stranger.identity.epoch = 3;
            stranger.join(&address)
        });
        let refused = stranger.join().unwrap().unwrap_err();
        assert!(refused.to_string().contains("epoch"), "{refused}");
        let guests: Vec<_> = [2, 1]
            .map(|rank| {
                let address = &address;
                scope.spawn(move || party(rank).join(address))
            })
            .into_iter()
            .map(|guest| guest.join().unwrap().unwrap())
            .collect();
        let host = host.join().unwrap().unwrap();
        for (mesh, rank) in [(&host, 0), (&guests[0], 2), (&guests[1], 1)] {
            let nodes: Vec<_> = mesh.members.iter().map(|member| &member.node).collect();
            assert_eq!(nodes, ["node-0", "node-1", "node-2"]);
            assert_eq!(
                mesh.capacity().unwrap(),
                party(2).capacity.min(party(0).capacity)
            );
            for (peer, connection) in mesh.connections.iter().enumerate() {
                assert_eq!(connection.is_some(), peer != rank, "rank {rank} to {peer}");
            }
        }
    });
}

#[test]
fn only_ranks_that_need_one_keep_a_connection() {
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let layout = Layout {
        tensor: 2,
        pipeline: 2,
    };
    let placement = Placement::new(layout, 2).unwrap();
    let party = |rank| {
        let mut party = party(rank);
        party.identity.placement = placement;
        party
    };
    let meshes: Vec<Mesh> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..4)
            .map(|rank| {
                let (party, address) = (party(rank), &address);
                scope.spawn(move || match rank {
                    0 => party.host(port).unwrap(),
                    _ => party.join(address).unwrap(),
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (rank, mesh) in meshes.iter().enumerate() {
        assert_eq!(mesh.members.len(), 4);
        for (peer, connection) in mesh.connections.iter().enumerate() {
            assert_eq!(
                connection.is_some(),
                placement.connects(rank, peer),
                "rank {rank} to {peer}"
            );
        }
    }
}

#[test]
fn another_model_ends_the_rendezvous_on_both_sides() {
    let port = free_port();
    std::thread::scope(|scope| {
        let host = scope.spawn(|| party(0).host(port));
        let mut guest = party(2);
        guest.identity.digest = "other".to_owned();
        let refused = guest.join(&format!("127.0.0.1:{port}")).unwrap_err();
        assert!(refused.to_string().contains("model digest"), "{refused}");
        let error = host.join().unwrap().unwrap_err();
        assert_eq!(error.rank(), Some(2));
        assert!(error.to_string().contains("node-2"), "{error}");
    });
}

#[test]
fn missing_ranks_are_named() {
    let mut host = party(0);
    host.deadline = Duration::from_millis(300);
    match host.host(free_port()) {
        Err(RendezvousError::Missing { missing, .. }) => assert_eq!(missing, [1, 2]),
        other => panic!("{other:?}"),
    }
    let mut guest = party(1);
    guest.deadline = Duration::from_millis(300);
    let error = guest
        .join(&format!("127.0.0.1:{}", free_port()))
        .unwrap_err();
    assert!(
        matches!(error, RendezvousError::Unreachable { rank: 1, .. }),
        "{error}"
    );
}
