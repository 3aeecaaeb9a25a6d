// Serves the number of requests and of goroutine ticks so far.
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

const workers = 4

func main() {
	var hits, ticks atomic.Int64
	for i := 0; i < workers; i++ {
		go func() {
			for {
				ticks.Add(1)
				time.Sleep(10 * time.Millisecond)
			}
		}()
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]int64{
			"hits": hits.Add(1), "ticks": ticks.Load(), "pid": int64(os.Getpid()),
		})
	})
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	log.Fatal(http.ListenAndServe(":"+port, nil))
}
