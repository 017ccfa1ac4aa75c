//! The threads that one rank computes with.

use rayon::prelude::*;

use crate::error::ModelError;

/// A fixed number of threads; with one, everything runs where it is called.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: Option<rayon::ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads, at least one.
    pub(crate) fn new(count: usize) -> Result<Self, ModelError> {
        let count = count.max(1);
        let build = || {
            rayon::ThreadPoolBuilder::new()
                .num_threads(count)
                .thread_name(|index| format!("compute-{index}"))
                .build()
        };
        let pool = (count > 1).then(build).transpose().map_err(|error| {
            ModelError::Memory(format!("start {count} compute threads: {error}"))
        })?;
        Ok(Self { pool, count })
    }

    /// Number of threads.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Runs `work` on one of the threads, so that what it starts there need not
    /// wake the others from outside.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            None => work(),
            Some(pool) => pool.install(work),
        }
    }

    /// Results of `work` on each item, in order.
    pub(crate) fn map<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: impl Fn(&T) -> R + Sync + Send,
    ) -> Vec<R> {
        match &self.pool {
            Some(pool) if items.len() > 1 => {
                pool.install(|| items.par_iter().with_max_len(1).map(work).collect())
            }
            _ => items.iter().map(work).collect(),
        }
    }
    /// Does `work` on stretches of `len` of `values`, the last of them perhaps shorter.
    pub(crate) fn each_chunk(
        &self,
        values: &mut [f32],
        len: usize,
        work: impl Fn(&mut [f32]) + Sync + Send,
    ) {
        match &self.pool {
            Some(pool) if values.len() > len => {
                pool.install(|| values.par_chunks_mut(len).for_each(work));
            }
            _ => values.chunks_mut(len).for_each(work),
        }
    }
}
