# What costs, and what goes wrong: a budget and three alerts, all to one address.

resource "google_monitoring_notification_channel" "email" {
  display_name = "${var.name}: ${var.email}"
  type         = "email"
  labels       = { email_address = var.email }
  depends_on   = [google_project_service.api]
}

resource "google_billing_budget" "month" {
  billing_account = var.billing_account
  display_name    = var.name
  budget_filter {
    projects = ["projects/${var.project}"]
  }
  amount {
    specified_amount {
      currency_code = var.currency
      units         = tostring(var.budget)
    }
  }
  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1.0]
    content {
      threshold_percent = threshold_rules.value
    }
  }
  all_updates_rule {
    monitoring_notification_channels = [google_monitoring_notification_channel.email.id]
  }
}

locals {
  ours = "resource.type = \"aiplatform.googleapis.com/Endpoint\" AND resource.labels.endpoint_id = \"${var.endpoint_id}\""
}

resource "google_monitoring_alert_policy" "errors" {
  display_name          = "${var.name}: requests fail"
  combiner              = "OR"
  notification_channels = [google_monitoring_notification_channel.email.id]
  conditions {
    display_name = "more than one failed request a minute, for five minutes"
    condition_threshold {
      filter          = "metric.type = \"aiplatform.googleapis.com/prediction/online/error_count\" AND ${local.ours}"
      comparison      = "COMPARISON_GT"
      threshold_value = 1 / 60
      duration        = "300s"
      aggregations {
        alignment_period     = "60s"
        per_series_aligner   = "ALIGN_RATE"
        cross_series_reducer = "REDUCE_SUM"
      }
    }
  }
}

resource "google_monitoring_alert_policy" "replicas" {
  display_name          = "${var.name}: as many replicas as there may be"
  combiner              = "OR"
  notification_channels = [google_monitoring_notification_channel.email.id]
  conditions {
    display_name = "--max-replicas for a quarter of an hour"
    condition_threshold {
      filter          = "metric.type = \"aiplatform.googleapis.com/prediction/online/replicas\" AND ${local.ours}"
      comparison      = "COMPARISON_GT"
      threshold_value = var.max_replicas - 1
      duration        = "900s"
      aggregations {
        alignment_period   = "60s"
        per_series_aligner = "ALIGN_MAX"
      }
    }
  }
}

# The forgotten endpoint is the expensive one. This looks at all endpoints of the project: six hours without a request,
# ten minutes at a time.
resource "google_monitoring_alert_policy" "unused" {
  display_name          = "${var.name}: deployed, and unused for six hours"
  combiner              = "OR"
  notification_channels = [google_monitoring_notification_channel.email.id]
  conditions {
    display_name = "replicas without a request"
    condition_prometheus_query_language {
      query               = <<-EOT
        sum by (endpoint_id) (aiplatform_googleapis_com:prediction_online_replicas{monitored_resource="aiplatform.googleapis.com/Endpoint"}) > 0
        unless on (endpoint_id)
        sum by (endpoint_id) (increase(aiplatform_googleapis_com:prediction_online_prediction_count{monitored_resource="aiplatform.googleapis.com/Endpoint"}[10m])) > 0
      EOT
      duration            = "21600s"
      evaluation_interval = "300s"
    }
  }
}
