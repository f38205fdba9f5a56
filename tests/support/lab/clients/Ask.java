// Java's own HttpClient in the lab: `java Ask.java FIRST COUNT [stream]`, HTTP/2 where it is spoken.
// Prints the status of each answer. It finds the proxy and its roots by Java's own properties.
import java.net.ProxySelector;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

public class Ask {
    public static void main(String[] arguments) throws Exception {
        int first = Integer.parseInt(arguments[0]);
        int count = Integer.parseInt(arguments[1]);
        boolean stream = arguments.length > 2;
        HttpClient client = HttpClient.newBuilder().proxy(ProxySelector.getDefault()).build();
        for (int n = first; n < first + count; n++) {
            String body = "{\"model\":\"claude-haiku-4-5\",\"max_tokens\":9,\"stream\":" + stream
                + ",\"messages\":[{\"role\":\"user\",\"content\":\"lab[n=" + n + "]\"}]}";
            HttpRequest request = HttpRequest.newBuilder(
                    URI.create("https://api.anthropic.com/v1/messages"))
                .header("x-api-key", "made-up")
                .header("content-type", "application/json")
                .POST(BodyPublishers.ofString(body))
                .build();
            System.out.println(client.send(request, BodyHandlers.ofString()).statusCode());
        }
    }
}
