//! The plain calls: a question, an answer.
//!
//! Knows the calls and the form of their answers. Must not know streams; that is [`Watch`].

use bytes::Bytes;
use tokio::time::timeout;
use tonic::{Response, Status, transport::Channel};
use waypost_proto::{
    id::UserId,
    v1::{self, GetRequest, ListStaleRequest},
};

use crate::{
    CheckerError, Config, Deadline, Entry, Gap, Resume, Selector, Violation, Watch, connection,
    event::user_of, rpc::freshness_client::FreshnessClient,
};

/// A connection to a gateway's freshness service. Clones share it; it comes back by itself. A call that is not
/// answered for [`Config::lost_after`] has failed.
#[derive(Clone, Debug)]
pub struct Checker {
    config: Config,
    client: FreshnessClient<Channel>,
}

/// What is known of the users that were asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// In the order asked.
    pub entries: Vec<Entry>,
    /// They are as of this commit.
    pub position: u64,
    /// They are complete up to this moment.
    pub resolved_ms: u64,
}

/// Some of the users who were not heard, longest silence first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StalePage {
    /// Who.
    pub entries: Vec<Entry>,
    /// Ask with this for the next page; none on the last.
    pub next_page_token: Option<Bytes>,
    /// They are as of this commit.
    pub position: u64,
    /// They are known to be silent up to this moment.
    pub resolved_ms: u64,
    /// They were last heard before this moment.
    pub older_than_ms: u64,
    /// When the gateway could not hear between that and `resolved_ms`.
    pub gaps: Vec<Gap>,
}

/// How often a user is expected to be heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineSetting {
    /// Who.
    pub user: UserId,
    /// At least this often; 0 removes the deadline. At most 366 days.
    pub expect_every_ms: u64,
    /// How much longer to wait before it is called late. At most 366 days.
    pub grace_ms: u64,
}

/// A deadline of this checker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadlineState {
    /// What was set.
    pub setting: DeadlineSetting,
    /// When it was first set.
    pub since_ms: u64,
    /// The event that holds while the user is late.
    pub late: Option<Deadline>,
}

/// Some of a checker's deadlines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadlinePage {
    /// By user.
    pub deadlines: Vec<DeadlineState>,
    /// Ask with this for the next page; none on the last.
    pub next_page_token: Option<Bytes>,
}

impl Checker {
    /// Connects.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used, or there is nobody there. A watch needs
    /// nobody to be there yet: see [`Watch::new`].
    pub async fn connect(config: Config) -> Result<Self, CheckerError> {
        let client = connection::connect(&config).await?;
        Ok(Self { config, client })
    }

    /// The entries of up to 1,000 users.
    ///
    /// # Errors
    /// When the service refuses or does not answer.
    pub async fn get(&mut self, users: &[UserId]) -> Result<Answer, CheckerError> {
        let user_ids = users
            .iter()
            .map(|user| Bytes::copy_from_slice(&user.0))
            .collect();
        let asked = self.client.get(GetRequest { user_ids });
        let answer = in_time(&self.config, asked).await?;
        if answer.entries.len() != users.len() {
            return Err(CheckerError::Failed(format!(
                "the gateway answered for {} users of {}",
                answer.entries.len(),
                users.len()
            )));
        }
        Ok(Answer {
            entries: entries(answer.entries)?,
            position: answer.position,
            resolved_ms: answer.resolved_ms,
        })
    }

    /// A page of the users who were not heard.
    ///
    /// # Errors
    /// When the service refuses or does not answer.
    pub async fn list_stale(
        &mut self,
        request: ListStaleRequest,
    ) -> Result<StalePage, CheckerError> {
        let asked = self.client.list_stale(request);
        let page = in_time(&self.config, asked).await?;
        Ok(StalePage {
            entries: entries(page.entries)?,
            next_page_token: (!page.next_page_token.is_empty()).then_some(page.next_page_token),
            position: page.position,
            resolved_ms: page.resolved_ms,
            older_than_ms: page.older_than_ms,
            gaps: page.coverage.into_iter().map(Gap::from).collect(),
        })
    }

    /// Sets, changes and removes up to 1,000 deadlines, and returns the commit by which they are on disk.
    ///
    /// # Errors
    /// When the service refuses, has no room for more, or does not answer; in that last case,
    /// [`CheckerError::Failed`], they may be set: set them again, which changes nothing if they are.
    pub async fn set_deadlines(
        &mut self,
        deadlines: &[DeadlineSetting],
    ) -> Result<u64, CheckerError> {
        let deadlines = deadlines
            .iter()
            .map(|deadline| v1::DeadlineSetting {
                user: Bytes::copy_from_slice(&deadline.user.0),
                expect_every_ms: deadline.expect_every_ms,
                grace_ms: deadline.grace_ms,
            })
            .collect();
        let request = v1::SetDeadlinesRequest { deadlines };
        let asked = self.client.set_deadlines(request);
        Ok(in_time(&self.config, asked).await?.position)
    }

    /// A page of this checker's deadlines, by user, at most 1,000 of them: the first, or the one that the page before
    /// names.
    ///
    /// # Errors
    /// When the service refuses or does not answer.
    pub async fn list_deadlines(
        &mut self,
        page_token: Option<Bytes>,
    ) -> Result<DeadlinePage, CheckerError> {
        let request = v1::ListDeadlinesRequest {
            page_token: page_token.unwrap_or_default(),
            ..v1::ListDeadlinesRequest::default()
        };
        let asked = self.client.list_deadlines(request);
        let page = in_time(&self.config, asked).await?;
        let deadlines = page.deadlines.into_iter().map(DeadlineState::try_from);
        Ok(DeadlinePage {
            deadlines: deadlines.collect::<Result<_, _>>().map_err(unreadable)?,
            next_page_token: (!page.next_page_token.is_empty()).then_some(page.next_page_token),
        })
    }

    /// Follows users over a connection of its own, from a snapshot or from where an earlier watch with the
    /// same selection was.
    ///
    /// # Errors
    /// When the address or the certificates cannot be used.
    pub fn watch(&self, selector: Selector, from: Option<Resume>) -> Result<Watch, CheckerError> {
        Watch::new(&self.config, selector, from)
    }
}

/// Waits for an answer, but not for ever: a gateway whose disk hangs keeps its connections alive.
async fn in_time<T>(
    config: &Config,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, CheckerError> {
    let patience = config.lost_after;
    let answer = timeout(patience, answer)
        .await
        .map_err(|_| CheckerError::Failed(format!("nothing came for {patience:?}")))?;
    Ok(answer?.into_inner())
}

fn entries(entries: Vec<v1::Entry>) -> Result<Vec<Entry>, CheckerError> {
    entries
        .into_iter()
        .map(Entry::try_from)
        .collect::<Result<_, Violation>>()
        .map_err(unreadable)
}

fn unreadable(violation: Violation) -> CheckerError {
    CheckerError::Failed(violation.to_string())
}

impl TryFrom<v1::DeadlineState> for DeadlineState {
    type Error = Violation;

    fn try_from(state: v1::DeadlineState) -> Result<Self, Violation> {
        let setting = state.setting.unwrap_or_default();
        Ok(Self {
            setting: DeadlineSetting {
                user: user_of(&setting.user)?,
                expect_every_ms: setting.expect_every_ms,
                grace_ms: setting.grace_ms,
            },
            since_ms: state.since_ms,
            late: state.late.map(Deadline::try_from).transpose()?,
        })
    }
}
