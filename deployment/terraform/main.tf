# All that the cloud chapter needs in a project, once:
#
#   terraform init
#   terraform apply -var project=PROJECT -var billing_account=ACCOUNT -var email=YOU \
#       -var github_repository=OWNER/NAME
#
# Models and deployments are not here: `python -m deployment.ai_platform` makes them, version by version, and finds the
# endpoint by its name. Take versions off it with `traffic --undeploy`; `delete` would delete the endpoint, too.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 6.50"
    }
  }
}

provider "google" {
  project               = var.project
  region                = var.location
  user_project_override = true # the quota of this project, not of the one in which somebody logged in
  billing_project       = var.project
}

resource "google_project_service" "api" {
  for_each = toset([
    "aiplatform", "artifactregistry", "billingbudgets", "cloudbuild", "iam", "iamcredentials", "logging", "monitoring",
    "storage", "sts",
  ])
  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false
}

# Images: the newest ten stay, and what is older than a month and bears no tag goes.
resource "google_artifact_registry_repository" "images" {
  repository_id = var.name
  location      = var.location
  format        = "DOCKER"
  cleanup_policies {
    id     = "newest"
    action = "KEEP"
    most_recent_versions {
      keep_count = 10
    }
  }
  cleanup_policies {
    id     = "old"
    action = "DELETE"
    condition {
      tag_state  = "UNTAGGED"
      older_than = "2592000s"
    }
  }
  depends_on = [google_project_service.api]
}

# Archives for versions, and what batch jobs read and write.
resource "google_storage_bucket" "files" {
  name                        = "${var.project}-${var.name}"
  location                    = var.location
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  lifecycle_rule {
    action {
      type = "Delete"
    }
    condition {
      age            = 30
      matches_prefix = ["batch/"]
    }
  }
}

# Who the container is: it reads the bucket, and nothing else.
resource "google_service_account" "serve" {
  account_id   = "${var.name}-serve"
  display_name = "The container of ${var.name}"
}

resource "google_storage_bucket_iam_member" "serve_reads" {
  bucket = google_storage_bucket.files.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.serve.member
}

# Who asks for predictions.
resource "google_service_account" "caller" {
  account_id   = "${var.name}-caller"
  display_name = "Asks ${var.name} for predictions"
}

resource "google_project_iam_custom_role" "caller" {
  role_id     = "${var.name}Caller"
  title       = "Asks endpoints for predictions"
  permissions = ["aiplatform.endpoints.predict", "aiplatform.endpoints.get", "aiplatform.endpoints.list"]
}

resource "google_project_iam_member" "caller" {
  project = var.project
  role    = google_project_iam_custom_role.caller.id
  member  = google_service_account.caller.member
}

# Who builds, uploads and deploys: the workflow in .github/workflows/cloud.yml, without a key.
resource "google_service_account" "deployer" {
  account_id   = "${var.name}-deployer"
  display_name = "Uploads and deploys ${var.name}"
}

resource "google_project_iam_member" "deployer" {
  project = var.project
  role    = "roles/aiplatform.user"
  member  = google_service_account.deployer.member
}

resource "google_artifact_registry_repository_iam_member" "deployer_pushes" {
  repository = google_artifact_registry_repository.images.name
  location   = var.location
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.deployer.member
}

resource "google_storage_bucket_iam_member" "deployer_writes" {
  bucket = google_storage_bucket.files.name
  role   = "roles/storage.objectAdmin"
  member = google_service_account.deployer.member
}

resource "google_service_account_iam_member" "deployer_runs_as" {
  service_account_id = google_service_account.serve.name
  role               = "roles/iam.serviceAccountUser"
  member             = google_service_account.deployer.member
}

resource "google_iam_workload_identity_pool" "github" {
  workload_identity_pool_id = "github"
  display_name              = "GitHub's workflows"
  depends_on                = [google_project_service.api]
}

resource "google_iam_workload_identity_pool_provider" "github" {
  workload_identity_pool_id          = google_iam_workload_identity_pool.github.workload_identity_pool_id
  workload_identity_pool_provider_id = "github"
  attribute_mapping = {
    "google.subject"       = "assertion.sub"
    "attribute.repository" = "assertion.repository"
  }
  attribute_condition = "assertion.repository == '${var.github_repository}' && assertion.ref == 'refs/heads/main'"
  oidc {
    issuer_uri = "https://token.actions.githubusercontent.com"
  }
}

resource "google_service_account_iam_member" "github_is_deployer" {
  service_account_id = google_service_account.deployer.name
  role               = "roles/iam.workloadIdentityUser"
  member             = "principalSet://iam.googleapis.com/${google_iam_workload_identity_pool.github.name}/attribute.repository/${var.github_repository}"
}

resource "google_vertex_ai_endpoint" "endpoint" {
  name                       = var.endpoint_id
  display_name               = var.name
  location                   = var.location
  dedicated_endpoint_enabled = true
  labels                     = var.labels
  depends_on                 = [google_project_service.api]
  lifecycle {
    ignore_changes = [traffic_split] # the client splits the traffic
  }
}
