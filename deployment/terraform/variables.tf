variable "project" {
  description = "ID of the project"
  type        = string
}

variable "billing_account" {
  description = "billing account of the project, 012345-678901-ABCDEF"
  type        = string
}

variable "email" {
  description = "who hears of budget and alerts"
  type        = string
}

variable "github_repository" {
  description = "OWNER/NAME of the repository whose main branch may deploy"
  type        = string
}

variable "location" {
  description = "region of all that is made"
  type        = string
  default     = "us-central1"
}

variable "name" {
  description = "of the model, its endpoint and its repository: letters and digits"
  type        = string
  default     = "fastunet"
}

variable "endpoint_id" {
  description = "number of the endpoint, at most ten digits"
  type        = string
  default     = "1000000001"
}

variable "max_replicas" {
  description = "--max-replicas of what is deployed; an alert comes when so many run"
  type        = number
  default     = 3
}

variable "budget" {
  description = "amount a month, in whole units of the currency"
  type        = number
  default     = 50
}

variable "currency" {
  description = "that of the billing account"
  type        = string
  default     = "USD"
}

variable "labels" {
  description = "of the endpoint, as the bill shows them"
  type        = map(string)
  default     = {}
}
