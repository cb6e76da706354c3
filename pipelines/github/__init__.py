"""
GitHub's REST API, as much of it as the jobs of this repository need.

    client     one HTTP client on GITHUB_API_URL: deadlines, limits, pages, dry runs
    commits    files to a branch as one commit, over the Git data API
    pulls      find, open and renew a pull request
    comments   one comment of ours on a pull request, whoever else writes at the same time
    checks     one check run with annotations on a commit
    issues     one issue for one subject, closed when it is over
    artifacts  what a run left behind, read as if a stranger had written it
    runners    the self-hosted runners, as GitHub sees them
"""
