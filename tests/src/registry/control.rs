//! What a test does from outside the process: `GET /_stats`, `POST /_stats/reset`, `GET /_faults`, `POST /_faults`.
//! These are not counted and meet no fault (but a registry that is down is down for them too).

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http_body_util::{BodyExt, Limited};
use serde::Serialize;

use super::faults::{FaultChanges, Faults};
use super::stats::Counters;

/// More faults than any test sets.
const FAULTS_MAX_BYTES: usize = 64 * 1024;

pub(crate) struct Control {
    pub(crate) counters: Arc<Counters>,
    pub(crate) faults: Arc<Faults>,
}

pub(crate) fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/_stats", get(|State(control): State<Arc<Control>>| async move { json(&control.counters.snapshot()) }))
        .route("/_stats/reset", post(reset))
        .route("/_faults", get(|State(control): State<Arc<Control>>| async move { json(&control.faults.snapshot()) }))
        .route("/_faults", post(change_faults))
        .with_state(control)
}

async fn reset(State(control): State<Arc<Control>>) -> StatusCode {
    control.counters.reset();
    StatusCode::NO_CONTENT
}

async fn change_faults(State(control): State<Arc<Control>>, body: Body) -> Response {
    let changes = match Limited::new(body, FAULTS_MAX_BYTES).collect().await {
        Ok(body) => serde_json::from_slice::<FaultChanges>(&body.to_bytes()).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match changes {
        Ok(changes) => {
            control.faults.change(changes);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string_pretty(value) {
        Ok(text) => ([(CONTENT_TYPE, "application/json")], text + "\n").into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
