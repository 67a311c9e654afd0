#!/usr/bin/env bash
# The server with nothing but curl: uploads a file, asks a question about it, takes everything away again.
#
#   BASE_URL=http://127.0.0.1:8000/v1 examples/curl.sh people.md "Where does Ada Morrow work?"
#
# A server with keys: OPENAI_API_KEY=… in the environment.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 FILE QUESTION" >&2; exit 2; }
FILE=$1
QUESTION=${2//\\/\\\\} QUESTION=${QUESTION//\"/\\\"} # as JSON has it
BASE_URL=${BASE_URL:-http://127.0.0.1:8000/v1}

call() { # call PATH [curl's arguments]
  curl -sS --fail-with-body -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$BASE_URL/$1" "${@:2}"
}
first() { # the first value of a field of a reply
  grep -o "\"$1\":\"[^\"]*\"" | head -1 | cut -d '"' -f 4
}

file=$(call files -F purpose=assistants -F "file=@$FILE" | first id)
store=$(call vector_stores --json "{\"name\": \"curl example\", \"file_ids\": [\"$file\"]}" | first id)
trap 'call "vector_stores/$store" -X DELETE > /dev/null; call "files/$file" -X DELETE > /dev/null' EXIT

until status=$(call "vector_stores/$store/files/$file" | first status); [ "$status" != in_progress ]; do sleep 0.2; done
[ "$status" = completed ] || { call "vector_stores/$store/files/$file" >&2; exit 1; }

response=$(call responses --json "{\"model\": \"${MODEL:-smollm2-reader}\", \"input\": \"$QUESTION\",
  \"tools\": [{\"type\": \"file_search\", \"vector_store_ids\": [\"$store\"]}]}")
echo "answer: $(first text <<< "$response")"
echo "cited: $(first filename <<< "$response")"

# the same by chat, event by event
call chat/completions -N --json "{\"model\": \"${MODEL:-smollm2-reader}\", \"collection\": \"$store\",
  \"stream\": true, \"messages\": [{\"role\": \"user\", \"content\": \"$QUESTION\"}]}"
