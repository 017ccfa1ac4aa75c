//! Bodies of requests, read within bounds of length, memory and time.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header;
use futures::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::openai::ApiError;

/// Longest request body: a prompt of a million tokens.
pub(crate) const MAX_BODY_BYTES: usize = 8 << 20;
/// Bodies up to this length are read without asking for room.
const SMALL_BODY_BYTES: usize = 64 << 10;
/// What longer bodies may take together; reading one as JSON takes several times more.
const ALL_BODIES_BYTES: usize = 32 << 20;
/// How long a client may take to send a body.
const BODY_DEADLINE: Duration = Duration::from_mins(1);

/// Room for bodies in memory.
#[derive(Debug)]
pub(crate) struct Room {
    bytes: Arc<Semaphore>,
    deadline: Duration,
}

/// A body, with the room it takes.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) bytes: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Default for Room {
    fn default() -> Self {
        Self {
            bytes: Arc::new(Semaphore::new(ALL_BODIES_BYTES)),
            deadline: BODY_DEADLINE,
        }
    }
}

impl Room {
    /// Reads the body of `request`.
    ///
    /// # Errors
    /// 413 when it is too long, before it was sent where its length was told; 429
    /// when there is no room now; 408 and 400 when it does not come.
    pub(crate) async fn read(&self, request: Request) -> Result<Body, ApiError> {
        let told = request.headers().get(header::CONTENT_LENGTH);
        let told = told.and_then(|len| len.to_str().ok()?.parse::<usize>().ok());
        let len = told.unwrap_or(MAX_BODY_BYTES);
        if len > MAX_BODY_BYTES {
            return Err(ApiError::body_too_long(MAX_BODY_BYTES));
        }
        let room = match u32::try_from(len) {
            Ok(len) if len as usize > SMALL_BODY_BYTES => Some(self.take(len)?),
            _ => None,
        };
        let bytes = tokio::time::timeout(self.deadline, collect(request))
            .await
            .map_err(|_late| ApiError::body_too_slow(self.deadline.as_secs()))??;
        Ok(Body { bytes, _room: room })
    }

    fn take(&self, len: u32) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.bytes)
            .try_acquire_many_owned(len)
            .map_err(|_full| {
                ApiError::overloaded("too many long requests are open; try again soon")
            })
    }
}

async fn collect(request: Request) -> Result<Vec<u8>, ApiError> {
    let mut stream = request.into_body().into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_broken| ApiError::invalid("the body did not arrive whole"))?;
        if bytes.len() + chunk.len() > MAX_BODY_BYTES {
            return Err(ApiError::body_too_long(MAX_BODY_BYTES));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;

    use super::*;

    fn request(len: Option<usize>, body: axum::body::Body) -> Request {
        let mut request = Request::new(body);
        if let Some(len) = len {
            request
                .headers_mut()
                .insert(header::CONTENT_LENGTH, len.into());
        }
        request
    }

    fn endless() -> axum::body::Body {
        let chunk = || Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 64 << 10]));
        axum::body::Body::from_stream(futures::stream::repeat_with(chunk))
    }

    fn silent() -> axum::body::Body {
        axum::body::Body::from_stream(futures::stream::pending::<std::io::Result<Bytes>>())
    }

    #[tokio::test]
    async fn bodies_are_read_within_bounds() {
        let room = Room {
            deadline: Duration::from_millis(20),
            ..Room::default()
        };
        let status = async |request| room.read(request).await.map_err(|error| error.status).err();
        assert_eq!(status(request(Some(2), "{}".into())).await, None);
        assert_eq!(status(request(None, "{}".into())).await, None);
        assert_eq!(status(request(Some(1 << 30), silent())).await, Some(413));
        assert_eq!(status(request(None, endless())).await, Some(413));
        assert_eq!(status(request(Some(2), silent())).await, Some(408));
        let broken = futures::stream::iter([Err::<Bytes, _>(std::io::Error::other("gone"))]);
        let broken = axum::body::Body::from_stream(broken);
        assert_eq!(status(request(None, broken)).await, Some(400));
    }

    #[tokio::test]
    async fn long_bodies_share_a_room() {
        let room = Room::default();
        let long = || request(None, "{}".into());
        let mut bodies = Vec::new();
        for _ in 0..ALL_BODIES_BYTES / MAX_BODY_BYTES {
            bodies.push(room.read(long()).await.expect("there is room"));
        }
        assert_eq!(room.read(long()).await.expect_err("full").status, 429);
        assert!(room.read(request(Some(2), "{}".into())).await.is_ok());
        drop(bodies);
        assert!(room.read(long()).await.is_ok());
    }
}
