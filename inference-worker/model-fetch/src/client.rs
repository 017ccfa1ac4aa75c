//! Requests, each with deadlines, and what their answers mean.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, CONTENT_RANGE, HeaderValue, IF_MATCH, RANGE};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use url::Url;

use crate::error::FetchError;

/// Time until a server must take a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Time without a byte after which an answer counts as broken off.
const SILENCE: Duration = Duration::from_secs(30);
/// Most redirects that are followed.
const REDIRECTS: usize = 10;
/// Most bytes of a listing.
const TEXT_LIMIT: usize = 32 << 20;
/// Characters of an error's text that are told.
const DETAIL: usize = 300;

/// Asks servers, with or without a token.
#[derive(Clone, Debug)]
pub(crate) struct Web {
    client: Client,
    token: Option<HeaderValue>,
    signs: bool,
}

/// Part of a file.
#[derive(Debug)]
pub(crate) struct Part {
    /// What brings the bytes.
    pub(crate) response: Response,
    /// Place of the first byte.
    pub(crate) start: u64,
    /// Bytes of the whole file, where the server says it.
    pub(crate) total: Option<u64>,
}

impl Web {
    /// `certificates` (PEM) are trusted besides the public ones. `token` is sent to the host that is asked, and to no other that it redirects to.
    /// `signs` tells that addresses carry a signature.
    pub(crate) fn new(
        certificates: Option<&str>,
        token: Option<&str>,
        signs: bool,
    ) -> Result<Self, FetchError> {
        let client = Client::builder()
            .tls_backend_preconfigured(tls(certificates)?)
            .redirect(Policy::custom(follow))
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .user_agent(concat!("llama-model-fetch/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(FetchError::Client)?;
        let token = token
            .map(|token| {
                let value = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
                let mut value = value.map_err(|_| FetchError::BadAddress {
                    field: "token",
                    value: String::new(),
                    problem: "has characters that no header may have".to_owned(),
                })?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()?;
        Ok(Self {
            client,
            token,
            signs,
        })
    }

    fn get(&self, url: &Url) -> RequestBuilder {
        let request = self.client.get(url.clone());
        match &self.token {
            Some(token) => request.header(AUTHORIZATION, token.clone()),
            None => request,
        }
    }

    /// A text, for example a listing, and the address of its next page.
    pub(crate) async fn text(
        &self,
        url: &Url,
        what: &'static str,
    ) -> Result<(String, Option<Url>), FetchError> {
        let response = self.send(self.get(url), url).await?;
        let mut response = self.good(response, url, what).await?;
        let next = next_page(&response);
        let mut text = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| broken(url, &e))? {
            text.extend_from_slice(&piece);
            if text.len() > TEXT_LIMIT {
                let problem = format!("a listing of more than {TEXT_LIMIT} bytes");
                return Err(FetchError::BadAnswer {
                    at: shown(url),
                    problem,
                });
            }
        }
        let text = String::from_utf8(text).map_err(|_| FetchError::BadAnswer {
            at: shown(url),
            problem: "a listing that is no UTF-8".to_owned(),
        })?;
        Ok((text, next))
    }

    /// The bytes of a file from `start` on, up to `end` where that is given. `version` is
    /// the entity tag that the file must still have.
    pub(crate) async fn part(
        &self,
        url: &Url,
        start: u64,
        end: Option<u64>,
        version: Option<&str>,
    ) -> Result<Part, FetchError> {
        let mut request = self.get(url);
        if start > 0 || end.is_some() {
            let end = end.map_or_else(String::new, |end| end.to_string());
            request = request.header(RANGE, format!("bytes={start}-{end}"));
        }
        if let Some(version) = version {
            request = request.header(IF_MATCH, version);
        }
        let response = self.send(request, url).await?;
        let response = self.good(response, url, "file").await?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let total = response.content_length();
            return Ok(Part {
                response,
                start: 0,
                total,
            });
        }
        let range = response.headers().get(CONTENT_RANGE);
        let range = range.and_then(|range| content_range(range.to_str().ok()?));
        match range {
            Some((first, total)) if first == start => Ok(Part {
                response,
                start,
                total,
            }),
            _ => Err(FetchError::BadAnswer {
                at: shown(url),
                problem: format!("another part than the one from byte {start} on"),
            }),
        }
    }

    async fn send(&self, request: RequestBuilder, url: &Url) -> Result<Response, FetchError> {
        request.send().await.map_err(|error| broken(url, &error))
    }

    /// `response`, if it is what was asked for.
    async fn good(
        &self,
        response: Response,
        url: &Url,
        what: &'static str,
    ) -> Result<Response, FetchError> {
        let (at, status) = (shown(url), response.status().as_u16());
        match status {
            200 | 206 => Ok(response),
            401 | 403 => Err(FetchError::Unauthorized {
                at,
                status,
                with: if self.signs || self.token.is_some() {
                    "it does not accept the credentials"
                } else {
                    "it wants credentials and none were given"
                },
            }),
            404 | 410 => Err(FetchError::NotFound { at, status, what }),
            412 => Err(FetchError::BadAnswer {
                at,
                problem: "another version of the file than the listing named".to_owned(),
            }),
            _ => {
                // It only explains; what cannot be read is not told.
                let text = start_of_text(response).await;
                Err(FetchError::Refused { at, status, text })
            }
        }
    }
}

async fn start_of_text(mut response: Response) -> String {
    let piece = response.chunk().await.ok().flatten().unwrap_or_default();
    let text = String::from_utf8_lossy(&piece);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(DETAIL).collect()
}

/// Follows, but never from a protected connection to an open one.
fn follow(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let leaves_tls = attempt.url().scheme() == "http"
        && attempt.previous().iter().any(|url| url.scheme() == "https");
    if leaves_tls {
        attempt.error("the server redirects from https to http")
    } else if attempt.previous().len() > REDIRECTS {
        attempt.error("too many redirects")
    } else {
        attempt.follow()
    }
}

fn tls(certificates: Option<&str>) -> Result<rustls::ClientConfig, FetchError> {
    let mut roots = rustls::RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    if let Some(text) = certificates {
        let bad = |error: &dyn std::fmt::Display| FetchError::Certificates(error.to_string());
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let certificate = certificate.map_err(|error| bad(&error))?;
            roots.add(certificate).map_err(|error| bad(&error))?;
            count += 1;
        }
        if count == 0 {
            return Err(bad(&"it holds no certificate in PEM"));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(FetchError::Tls)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

/// `url` without what may be secret.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for addresses that cannot have either.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

pub(crate) fn broken(url: &Url, error: &reqwest::Error) -> FetchError {
    let mut source: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut cause = None;
    while let Some(error) = source {
        if let Some(problem) = of_tls(error) {
            let (at, problem) = (shown(url), problem.clone());
            return FetchError::Untrusted { at, problem };
        }
        cause = Some(error.to_string());
        source = error.source();
    }
    let what = if error.is_timeout() {
        "did not answer in time"
    } else if error.is_connect() {
        "could not be reached"
    } else if error.is_redirect() {
        "redirects where that is not followed"
    } else {
        "broke off"
    };
    let problem = match cause {
        Some(cause) if !error.is_timeout() => format!("{what}: {cause}"),
        _ => what.to_owned(),
    };
    FetchError::Unreachable {
        at: shown(url),
        problem,
        attempts: 1,
    }
}

/// What TLS does not like, of an error that wraps it.
fn of_tls<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(found) = error.downcast_ref() {
        return Some(found);
    }
    // What such an error wraps is not its source.
    of_tls(error.downcast_ref::<std::io::Error>()?.get_ref()?)
}

/// First byte and whole length of `bytes 5-9/20`; no length where the server writes `*`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, total.trim().parse().ok()))
}

/// The address that `Link: <…>; rel="next"` names.
fn next_page(response: &Response) -> Option<Url> {
    let links = response.headers().get_all(reqwest::header::LINK);
    links.into_iter().find_map(|value| {
        value.to_str().ok()?.split(',').find_map(|link| {
            let (address, relation) = link.trim().split_once('>')?;
            let next = relation.contains("rel=\"next\"") || relation.contains("rel=next");
            let address = address.strip_prefix('<').filter(|_| next)?;
            response.url().join(address).ok()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/20"), Some((5, Some(20))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(content_range("bytes */20"), None);
        assert_eq!(content_range("items 5-9/20"), None);
    }

    #[test]
    fn an_address_is_shown_without_its_secrets() {
        let url = Url::parse("https://me:word@host:1/a/b?X-Amz-Signature=1#x").unwrap();
        assert_eq!(shown(&url), "https://host:1/a/b");
    }
}
