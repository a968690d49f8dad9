//! The layer that applies the faults to requests and answers.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::{CONTENT_RANGE, LOCATION, RANGE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::answer::fix_length;
use super::connection::{ConnectionHandle, End};
use super::faults::{Faults, Toxic};
use super::range::ContentRange;

/// Applies what [`Faults::meet`] says: on the way in the toxics that answer or hold back, on the way out those that
/// spoil the answer.
pub(crate) async fn layer(
    State(faults): State<Arc<Faults>>,
    ConnectInfo(connection): ConnectInfo<ConnectionHandle>,
    mut request: Request,
    next: Next,
) -> Response {
    let met = faults.meet(request.method().as_str(), request.uri().path());
    for (name, toxic) in &met {
        match toxic {
            Toxic::Latency { latency_ms } => tokio::time::sleep(Duration::from_millis(*latency_ms)).await,
            Toxic::Hang => faults.until_over(name).await,
            Toxic::Status { code } => {
                return StatusCode::from_u16(*code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR).into_response();
            }
            Toxic::TooManyRequests { retry_after_s } => {
                return come_back(StatusCode::TOO_MANY_REQUESTS, *retry_after_s);
            }
            Toxic::Unavailable { retry_after_s } => return come_back(StatusCode::SERVICE_UNAVAILABLE, *retry_after_s),
            Toxic::IgnoreRange => drop(request.headers_mut().remove(RANGE)),
            _ => (),
        }
    }
    let path = request.uri().path().to_owned();
    let mut response = fix_length(next.run(request).await);
    for (_, toxic) in &met {
        response = match toxic {
            Toxic::Slow { bytes_per_s } => slow(response, *bytes_per_s),
            Toxic::ShortBody { after_bytes } => cut(response, *after_bytes, connection.clone(), End::Close),
            Toxic::Reset { after_bytes } => cut(response, *after_bytes, connection.clone(), End::Reset),
            Toxic::WrongContentRange => shift_content_range(response),
            Toxic::BitFlip { offset_bytes } => flip_bit(response, *offset_bytes),
            Toxic::Redirect { to } if response.status().is_success() => {
                let (to, query) =
                    to.split_once('?').map_or((to.as_str(), String::new()), |(to, query)| (to, format!("?{query}")));
                (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, format!("{to}{path}{query}"))]).into_response()
            }
            _ => response,
        };
    }
    response
}

fn come_back(status: StatusCode, retry_after_s: u64) -> Response {
    (status, [(RETRY_AFTER, retry_after_s.to_string())]).into_response()
}

/// The body comes in small pieces, each as late as the rate says.
fn slow(response: Response, bytes_per_s: u64) -> Response {
    /// Small enough for a steady flow, large enough that the runtime's timer of 1 ms does not count.
    const PIECE: Duration = Duration::from_millis(10);
    let piece_bytes = usize::try_from(bytes_per_s / 100).unwrap_or(usize::MAX).max(1);
    let (parts, body) = response.into_parts();
    let start = tokio::time::Instant::now();
    let state = (body.into_data_stream(), Bytes::new(), 0_u32);
    let pieces = futures_util::stream::try_unfold(state, move |(mut whole, mut frame, number)| async move {
        while frame.is_empty() {
            match whole.next().await {
                Some(next) => frame = next?,
                None => return Ok::<_, axum::Error>(None),
            }
        }
        tokio::time::sleep_until(start + PIECE * number).await;
        let piece = frame.split_to(piece_bytes.min(frame.len()));
        Ok(Some((piece, (whole, frame, number + 1))))
    });
    Response::from_parts(parts, Body::from_stream(pieces))
}

/// The body stops after `after_bytes`, and the connection ends.
fn cut(response: Response, after_bytes: u64, connection: ConnectionHandle, end: End) -> Response {
    let (parts, body) = response.into_parts();
    let whole = body.into_data_stream();
    let frames = futures_util::stream::try_unfold((whole, after_bytes), move |(mut whole, left)| {
        let connection = connection.clone();
        async move {
            if left > 0
                && let Some(frame) = whole.next().await
            {
                let frame = frame?;
                let frame = frame.slice(..frame.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
                let left = left - frame.len() as u64;
                return Ok::<_, axum::Error>(Some((frame, (whole, left))));
            }
            connection.end(end);
            std::future::pending().await
        }
    });
    Response::from_parts(parts, Body::from_stream(frames))
}

fn shift_content_range(mut response: Response) -> Response {
    if let Some(range) = ContentRange::of(response.headers()) {
        let shifted = ContentRange { start: range.start + 1, end: range.end + 1, ..range };
        if let Ok(value) = HeaderValue::from_str(&shifted.to_string()) {
            response.headers_mut().insert(CONTENT_RANGE, value);
        }
    }
    response
}

fn flip_bit(response: Response, offset_bytes: u64) -> Response {
    let start = ContentRange::of(response.headers()).map_or(0, |range| range.start);
    let (parts, body) = response.into_parts();
    let frames = body.into_data_stream().scan(start, move |position, frame| {
        let frame = frame.map(|frame| {
            let at = offset_bytes.checked_sub(*position).and_then(|at| usize::try_from(at).ok());
            *position += frame.len() as u64;
            flipped(frame, at)
        });
        std::future::ready(Some(frame))
    });
    Response::from_parts(parts, Body::from_stream(frames))
}

fn flipped(frame: Bytes, at: Option<usize>) -> Bytes {
    let Some(at) = at.filter(|at| *at < frame.len()) else { return frame };
    let mut frame = BytesMut::from(frame);
    frame[at] ^= 1;
    frame.freeze()
}
