//! What tests of the backends share: data, a series of operations with what each
//! rank must get from it, and groups of threads.

use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use llama_model::{Layout, order};

use super::board::Board;
use super::placement::Placement;
use super::region::Region;
use super::shm::ShmLink;
use super::{Link, Words};

/// What rank `rank` brings: magnitudes that make the order of summation visible.
pub(super) fn values(rank: usize, len: usize) -> Vec<f32> {
    const SCALES: [f32; 7] = [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3];
    (0..len)
        .map(|i| ((i * 31 + rank * 17) % 97) as f32 * SCALES[(i + rank) % 7])
        .collect()
}

/// The sum over `ranks`, taken in the order that all backends share.
pub(super) fn sum_in_order(ranks: Range<usize>, len: usize) -> Vec<f32> {
    let mut rows: Vec<f32> = ranks.flat_map(|rank| values(rank, len)).collect();
    order::sum_rows(&mut rows, len);
    rows.truncate(len);
    rows
}

/// All parts, in rank order.
fn gathered(lens: &[usize]) -> Vec<f32> {
    let parts = lens.iter().enumerate();
    parts.flat_map(|(rank, len)| values(rank, *len)).collect()
}

/// What a rank has got from [`operate`], values as bits.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Outcome {
    sum: Vec<u32>,
    received: Option<Vec<u32>>,
    gathered: Vec<u32>,
    payload: Vec<u8>,
    words: Vec<Words>,
}

impl std::fmt::Debug for Outcome {
    /// Without what may be millions of values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = |bits: &[u32]| -> Vec<f32> {
            bits.iter()
                .take(4)
                .map(|bits| f32::from_bits(*bits))
                .collect()
        };
        f.debug_struct("Outcome")
            .field("sum", &head(&self.sum))
            .field("received", &self.received.as_deref().map(head))
            .field("gathered", &head(&self.gathered))
            .field("payload", &self.payload.len())
            .field("words", &self.words)
            .finish()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

fn words(rank: usize) -> Words {
    [rank as u64, 7, u64::MAX - rank as u64]
}

/// Every operation once, as in a step: a plan, headers, sums of `len` values in each
/// stage, these to the next stage, and parts of `lens` from everybody.
pub(super) fn operate(link: &mut dyn Link, len: usize, lens: &[usize]) -> Outcome {
    let (rank, layout) = (link.rank(), link.layout());
    let mut plan = if rank == 0 {
        payload(len * 3)
    } else {
        vec![9; 5]
    };
    link.broadcast(&mut plan).unwrap();
    let all_words = link.gather_words(words(rank)).unwrap();
    let received = (layout.stage(rank) > 0).then(|| {
        let mut received = vec![0.0; len];
        link.receive_previous(&mut received).unwrap();
        bits(&received)
    });
    let mut sum = values(rank, len);
    link.all_reduce_sum(&mut sum).unwrap();
    if layout.stage(rank) + 1 < layout.pipeline {
        link.send_next(&sum).unwrap();
    }
    let mut out = vec![f32::NAN; lens.iter().sum()];
    let part = values(rank, lens[rank]);
    link.all_gather(&part, lens, &mut out).unwrap();
    Outcome {
        sum: bits(&sum),
        received,
        gathered: bits(&out),
        payload: plan,
        words: all_words,
    }
}

/// What [`operate`] must give `rank`.
pub(super) fn expected(layout: Layout, rank: usize, len: usize, lens: &[usize]) -> Outcome {
    let stage = layout.stage(rank);
    let sum = |stage: usize| bits(&sum_in_order(layout.ranks_of(stage), len));
    Outcome {
        sum: sum(stage),
        received: stage.checked_sub(1).map(sum),
        gathered: bits(&gathered(lens)),
        payload: payload(len * 3),
        words: (0..layout.world()).map(words).collect(),
    }
}

/// Groups of up to nine ranks, in one stage and in several.
pub(super) fn layouts() -> Vec<Layout> {
    let grids = [(2, 2), (4, 2), (1, 3), (3, 2), (2, 3)];
    (1..=9)
        .map(Layout::tensor)
        .chain(grids.map(|(tensor, pipeline)| Layout { tensor, pipeline }))
        .collect()
}

/// Lengths of the parts that ranks of a world bring: all alike, unlike, only the
/// last stage's, none.
pub(super) fn gathers(layout: Layout) -> [Vec<usize>; 4] {
    let ranks = || 0..layout.world();
    [
        ranks().map(|_| 100).collect(),
        ranks().map(|rank| rank * 37 % 11 * 20).collect(),
        ranks()
            .map(|rank| usize::from(layout.stage(rank) + 1 == layout.pipeline) * 50)
            .collect(),
        ranks().map(|_| 0).collect(),
    ]
}

/// Runs `body` on a thread for each of `links` and returns what they returned, in
/// order.
pub(super) fn group<L: Link, T: Send>(links: Vec<L>, body: impl Fn(L) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = links
            .into_iter()
            .map(|link| {
                let body = &body;
                scope.spawn(move || body(link))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The shared memory of each pod.
pub(super) fn pods(placement: Placement) -> Vec<(Arc<Region>, Board)> {
    (0..placement.pods())
        .map(|_| {
            let ranks = placement.ranks_per_pod;
            let region = Arc::new(Region::create(ShmLink::bytes(ranks)).unwrap());
            let board = Board::new(Arc::clone(&region), ranks).unwrap();
            (region, board)
        })
        .collect()
}

/// Runs `body` while `hearts` beat: ranks, by their place in the pod of a board.
pub(super) fn beating<T>(hearts: &[(Board, usize)], body: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (board, local) in hearts {
                    board.beat(*local);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        body()
    })
}

/// Connections on loopback between all ranks that need one: `mesh[a][b]` is a's end
/// to b.
pub(super) fn mesh(placement: Placement) -> Vec<Vec<Option<TcpStream>>> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let world = placement.world();
    let mut mesh: Vec<Vec<Option<TcpStream>>> = (0..world)
        .map(|_| (0..world).map(|_| None).collect())
        .collect();
    let pairs = (0..world).flat_map(|a| (0..a).map(move |b| (a, b)));
    for (a, b) in pairs.filter(|(a, b)| placement.connects(*a, *b)) {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        mesh[a][b] = Some(near);
        mesh[b][a] = Some(listener.accept().unwrap().0);
    }
    mesh
}
