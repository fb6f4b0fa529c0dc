output "image" {
  description = "for `docker push` and `python -m deployment.ai_platform upload`, less the tag"
  value       = "${var.location}-docker.pkg.dev/${var.project}/${google_artifact_registry_repository.images.repository_id}/serve"
}

output "bucket" {
  description = "for `--artifacts` and `batch --to`"
  value       = google_storage_bucket.files.url
}

output "service_account" {
  description = "for `deploy --service-account`"
  value       = google_service_account.serve.email
}

output "github" {
  description = "the workflow's secrets: the provider, and whom it may be"
  value = {
    GCP_PROVIDER = google_iam_workload_identity_pool_provider.github.name
    GCP_DEPLOYER = google_service_account.deployer.email
  }
}
